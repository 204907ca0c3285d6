"""Kill a sweep twenty times, at random moments of up to three runs, and see what is left.

Some of the kills come in the middle of writing a file. `python tests/experiments/kill_sweeps.py FOLDER` prints what
it counted as JSON. Everything is imported and loaded once; each attempt is a fork, which begins to train at once. With
one thread per process nothing is lost in a fork.
"""

import json
import os
import random
import signal
import statistics
import sys
import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

import sgd_sai.experiments.runs as runs
from sgd_sai.experiments.runs import load_runs, run_path
from sgd_sai.experiments.sweep import Sweep, expand, run_sweep
from sgd_sai.experiments.tasks.registry import get_task

KILLS, IN_WRITING = 20, 7
SWEEP = Sweep(
    "digits-vit",
    ["sgd_sai", "adamw"],
    seeds=10,
    steps=3,
    batch_size=[16],
    grid={"sgd_sai": {"lr": [0.01, 0.02]}, "adamw": {"lr": [0.001, 0.003]}},
)


def attempt(folder, marker):
    "A fork that sweeps; with a marker it says when it is about to finish its first file, and never does."
    pid = os.fork()
    if pid:
        return pid
    if marker:
        runs.os.fsync = lambda fd: (Path(marker).touch(), time.sleep(600))
    run_sweep(SWEEP, folder, device="cpu")
    os._exit(0)


def files(folder):
    "Name, time and content of the run files; all can be read."
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that cannot be read is a warning
        loaded = load_runs(folder)
    found = {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in Path(folder).glob("*/*.json")}
    assert len(loaded) == len(found)
    return found


def wait_for(done):
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "the sweep does not go on"
        time.sleep(0.005)


def has_files(folder, count):
    return len(list(folder.glob("*/*.json"))) >= count


def main(root):
    torch.set_num_threads(1)
    draw, folder, marker = random.Random(0), Path(root) / "killed", Path(root) / "writing"
    straight = run_sweep(SWEEP, Path(root) / "straight", device="cpu")
    ends = sorted(path.stat().st_mtime for path in Path(root).glob("straight/*/*.json"))
    one = statistics.median(b - a for a, b in pairwise(ends))  # seconds of a run
    counted = {"kills": 0, "in_writing": 0, "rewritten": 0, "temporary_files": 0}
    known = {}
    for i in range(KILLS):
        writing = i % 3 == 1 and counted["in_writing"] < IN_WRITING
        marker.unlink(missing_ok=True)
        pid = attempt(folder, marker if writing else None)
        enough = len(known) + draw.randint(0, 2)
        wait_for(marker.exists if writing else partial(has_files, folder, enough))
        time.sleep(draw.uniform(0, one))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        counted["kills"] += os.WIFSIGNALED(status)
        counted["in_writing"] += writing
        now = files(folder) if folder.exists() else {}
        counted["rewritten"] += sum(now.get(name) != old for name, old in known.items())
        known = now
    counted["finished_before_the_end"] = len(known)
    counted["temporary_files"] = len(list(folder.glob("*/.part-*")))
    done = run_sweep(SWEEP, folder, device="cpu")
    now = files(folder)
    counted["rewritten"] += sum(now.get(name) != old for name, old in known.items())
    wanted = {run_path(folder, spec).name for spec in expand(SWEEP, get_task(SWEEP.task).load())}
    counted |= {
        "runs": len(wanted),
        "lost": len(wanted - now.keys()),
        "duplicated": len(now.keys() - wanted) + counted["rewritten"],
        "failures": len(done["failures"]),
        "trained_at_the_end": done["trained"],
        "different": sum(a["final"] != b["final"] for a, b in zip(straight["runs"], done["runs"], strict=True)),
    }
    print(json.dumps(counted))


if __name__ == "__main__":
    main(sys.argv[1])
