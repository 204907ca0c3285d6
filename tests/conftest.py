import hashlib
import json
import os
import pickle
import struct
import tempfile
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--record-ways", action="store_true", help="write what the tests of ways of training find to results/ways.json"
    )
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run only what has something to do on a CUDA device, and fail if there is none",
    )


def cuda_available():
    import torch

    return torch.cuda.is_available()


def pytest_configure(config):
    "Without a GPU Triton's kernels run in its interpreter, for which Triton asks when it is imported."
    if not cuda_available():
        os.environ["TRITON_INTERPRET"] = "1"


def turn(item):
    "What takes long comes first, the longest before all others, so that several workers end together."
    if "tutorials/" in item.nodeid or item.path.stem in ("test_ways", "test_site"):
        return 0
    return 1 if item.get_closest_marker("notebook") or item.path.stem == "test_faults" else 2


def pytest_collection_modifyitems(config, items):
    items.sort(key=turn)
    if config.getoption("--gpu"):
        if not cuda_available():
            raise pytest.UsageError("--gpu: torch finds no CUDA device here")
        others = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("gpu")]
        return
    # a notebook with GPU cells runs everywhere, without those cells where there is no GPU
    only_gpu = [item for item in items if item.get_closest_marker("gpu") and not item.get_closest_marker("notebook")]
    if only_gpu and not cuda_available():
        for item in only_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def triton_on_cpu(monkeypatch):
    "Let Triton's kernels take tensors on the CPU as well, in its interpreter."
    from sgd_sai.internals import tensor_tables

    monkeypatch.setattr(tensor_tables, "TRITON_DEVICES", ("cuda", "cpu"))


@pytest.fixture
def record_way(request):
    """A function of section, way, and the numbers by optimizer.

    It compares the numbers with results/ways.json, or writes them there with --record-ways."""
    from filelock import FileLock

    path = Path(__file__).resolve().parents[1] / "results" / "ways.json"

    def verdicts(found):
        return {
            name: {key: value for key, value in numbers.items() if isinstance(value, bool)}
            for name, numbers in found.items()
        }

    def record(section, way, found):
        if request.config.getoption("--record-ways"):
            with FileLock(Path(tempfile.gettempdir()) / "record-ways.lock"):
                known = json.loads(path.read_text()) if path.exists() else {}
                known.setdefault(section, {})[way] = {
                    name: {
                        key: float(f"{value:.1e}") if isinstance(value, float) else value
                        for key, value in numbers.items()
                    }
                    for name, numbers in found.items()
                }
                path.write_text(json.dumps(known, indent=1) + "\n")
        else:
            known = json.loads(path.read_text())
            assert verdicts(known[section][way]) == verdicts(found), (
                "results/ways.json says something else; --record-ways writes it anew"
            )

    return record


@pytest.fixture
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def kernels_for_small_tensors_too(monkeypatch):
    "Lower the limit of the shortcut for small tensors, so that the other implementations see the models of the tests."
    import sgd_sai.adan_kernels
    import sgd_sai.kernels

    for module in (sgd_sai.adan_kernels, sgd_sai.kernels):
        monkeypatch.setattr(module, "SINGLE_CORE_MAX", 4)


# --- data of the same form as those that are downloaded -------------------------------------------------------------


@pytest.fixture
def fashion(tmp_path):
    "A folder with 96 + 32 images in the format of Fashion-MNIST."
    import numpy as np

    raw, random = tmp_path / "FashionMNIST" / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True)
    for part, n in (("train", 96), ("t10k", 32)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n, 28, 28) + random.integers(0, 256, n * 784, dtype=np.uint8).tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, n) + random.integers(0, 10, n, dtype=np.uint8).tobytes()
        )
    return tmp_path


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "A folder with 500 + 100 images in the format of CIFAR-10, whose checksums torchvision is told."
    import numpy as np
    import torchvision

    folder, random = tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()

    def put(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch():
        return {
            "data": random.integers(0, 256, (100, 3072), dtype=np.uint8),
            "labels": random.integers(0, 10, 100).tolist(),
        }

    CIFAR10 = torchvision.datasets.CIFAR10
    monkeypatch.setattr(CIFAR10, "train_list", [put(f"data_batch_{i}", batch()) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [put("test_batch", batch())])
    name, md5 = put("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path
