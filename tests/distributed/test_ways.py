"""Every way of training against the same loop in one process, by the equations.

These are the numbers behind the table of the tutorial on many processes. `pytest tests/distributed --record-ways`
writes them to results/ways.json; without the option they are compared with that file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_process_ways import ONE_PROCESS, measure_one

from sgd_sai.gsnr import gsnr

HALF = 2e-3  # where a forward pass rounds to sixteen bits, which multiplies the last digit


def check(label, found, most=1e-5):
    "All that the table promises about one way of training with one optimizer."
    assert found["loss"] <= most, (label, found)
    assert found["resume"] and found["fell"] > 0.01, (label, found)
    if "G" in found:
        assert found["G"] < 1e-6 and found["unfreeze"], (label, found)


@pytest.mark.parametrize("label", ONE_PROCESS)
def test_one_process(label, record_way):
    torch.set_num_threads(1)
    found = {name: measure_one(ONE_PROCESS[label], name) for name in ("SGDSaI", "Adan")}
    for name in found:
        check((label, name), found[name], HALF if "float16" in label else 1e-5)
    record_way("one process", label, found)


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    "What each of four processes found, from ways.py."
    out = tmp_path_factory.mktemp("ways") / "found.json"
    command = [sys.executable, str(Path(__file__).parent / "ways.py"), str(out)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads(out.read_text())


def test_several_processes(four_processes, record_way):
    "One test, so that only one worker starts the four."
    labels = [key for key in four_processes[0] if key != "checks"]
    assert len(labels) == 33
    rows = {}
    for label in labels:
        way, name = label.split(" | ")
        found = [rank[label] for rank in four_processes]
        if "refused" in found[0]:
            assert name == "AdaHessian" and all("refused" in each for each in found)
            rows.setdefault(way, {})[name] = {"refused": True}
            continue
        for each in found:
            check(label, each)
        worst = {key: max(each[key] for each in found) for key in ("loss", "G") if key in found[0]}
        rows.setdefault(way, {})[name] = found[0] | worst
    for way, found in rows.items():
        record_way("four processes", way, found)
    other_checks([rank["checks"] for rank in four_processes])


def other_checks(ranks):
    for found in ranks:
        # in the first step, for each dimension of the mesh along which tensors are sharded, one all-gather that
        # compares the parameters, and two all-reduces of sums and of largest entries; with two dimensions one message
        # more for each, that passes errors on; with FSDP1 one more, for what others may have loaded; none afterwards
        assert found["messages"] == {
            "FSDP2": [3, 0],
            "hybrid": [3, 0],
            "tensor parallel and FSDP2": [8, 0],
            "DDP": [0, 0],
            "FSDP1": [4, 0],
        }
        assert (
            found["not finite"][0].startswith("the first gradient of embed.weight is not finite")
            and found["not finite"][1]
        )
        said = found["refusals"]
        assert "flat parameter of FSDP1" in said["flat"] and "fully_shard" in said["flat"]
        assert (
            "register_fsdp1(optimizer, model)" in said["shards"] and "is a shard that FSDP1 has made" in said["shards"]
        )
        assert (
            "a flat partition (ZeRO) in place of parameters" in said["partition"] and "whole matrices" in said["muon"]
        )
        assert found["asked"] is True
        said, scales = found["one rank differs"]
        assert "the optimizers of the processes do not hold the same parameters" in said
        torch.manual_seed(0)
        assert scales == pytest.approx(
            dict.fromkeys(("by rows", "by columns"), gsnr(torch.randn(6, 6)).item()), rel=1e-6
        )
        for difference, same_scales in found["other numbers"].values():
            assert difference < 1e-6 and same_scales
        assert found["Muon, FSDP2"] < 1e-5 and found["Muon, both"] < 1e-5
        difference, clocks = found["Adan that restarts"]
        assert difference < 1e-5 and clocks[0] == clocks[1] < 10
    assert [sorted(found["other numbers"]) for found in ranks] == [
        ["four", "one", "two"],
        ["four", "two"],
        ["four"],
        ["four"],
    ]
