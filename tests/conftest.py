import pytest


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run only what has something to do on a CUDA device, and fail if there is none")


def cuda_available():
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
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
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def kernels_for_small_tensors_too(monkeypatch):
    "Leave the shortcut for small tensors to very small ones, so that the other implementations see the models of the tests."
    import sgd_sai.adan
    import sgd_sai.optimizer

    for module in (sgd_sai.adan, sgd_sai.optimizer):
        monkeypatch.setattr(module, "SMALL", 4)
