"What goes wrong around training: kills, full disks, two sweeps in one folder, a process of several that dies."

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from typer.testing import CliRunner

import sgd_sai.experiments.plugins as plugins
import sgd_sai.experiments.runs as runs
from sgd_sai.cli.app import app
from sgd_sai.experiments.optimizers import OPTIMIZERS
from sgd_sai.experiments.runs import load_runs, remove_partial_files
from sgd_sai.experiments.sweep import read_sweep, run_sweep

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
KEPT = "The runs finished so far are kept; the same command goes on"
SMALL = dict(task="digits-vit", optimizers=["sgd_sai", "adamw"], seeds=2, steps=3, batch_size=[32, 64])


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def written(folder, **changes):
    file = folder / "small.yaml"
    file.write_text(json.dumps(SMALL | changes))  # JSON is YAML
    return file


def started(*arguments, **how):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **how,
    )


def test_twenty_kills_lose_nothing_and_double_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "kill_sweeps.py"), str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counted = json.loads(done.stdout.splitlines()[-1])
    assert (
        counted["kills"] == 20 and counted["in_writing"] == 7 <= counted["temporary_files"]
    )  # a kill at a random moment may come while a file is written too
    assert 5 < counted["finished_before_the_end"] < 40
    assert counted["lost"] == counted["duplicated"] == counted["failures"] == counted["different"] == 0
    assert (
        counted["trained_at_the_end"] == counted["runs"] - counted["finished_before_the_end"] and counted["runs"] == 40
    )


def test_two_sweeps_in_one_folder_share_the_work(tmp_path):
    file = written(tmp_path, seeds=3, steps=30)
    command = ["-m", "sgd_sai", "sweep", file, "--out", tmp_path / "runs", "--device", "cpu", "--workers", 1]
    both = [started(*command) for _ in range(2)]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    trained = [int(re.search(r"12, of which (\d+) trained now", text)[1]) for text in said]
    assert sum(trained) == 12 and min(trained) > 0, trained
    assert len(load_runs(tmp_path / "runs")) == 12 and not list((tmp_path / "runs").rglob(".part-*"))
    assert not [path for path in (tmp_path / "runs").rglob(".locks/*")]


# --- files that cannot be written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_ends_a_sweep_in_one_line_and_keeps_what_is_finished(tmp_path, workers):
    "A real one, where a file system of one's own may be made; the small task writes some kilobytes per run."
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = cli("sweep", written(tmp_path), "--out", disk, "--device", "cpu", "--workers", workers)
        finished = {path: path.read_text() for path in disk.glob("*/*.json")}
        assert done.exit_code == 1 and 0 < len(finished) < 8, done.output
        said = [line for line in done.output.splitlines() if line.startswith(("Error", "Traceback"))]
        assert said == [f"Error: cannot write to {disk}/digits-vit: No space left on device. {KEPT}"]
        assert not list(disk.rglob(".part-*")) and all(json.loads(text) for text in finished.values())
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        again = run_sweep(read_sweep(tmp_path / "small.yaml"), disk, device="cpu")
        assert again["trained"] == 8 - len(finished) and all(
            path.read_text() == text for path, text in finished.items()
        )
    finally:
        subprocess.run(["umount", "-l", str(disk)])


@pytest.mark.parametrize("command", ["sweep", "compare"])
def test_disk_that_fills_up_while_training(tmp_path, command, monkeypatch):
    "The same everywhere: the third file cannot be finished."
    calls, fsync = [], os.fsync

    def full(fd):
        calls.append(fd)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    monkeypatch.setattr(runs.os, "fsync", full)
    out = tmp_path / "runs"
    given = [written(tmp_path)] if command == "sweep" else ["--optimizers", "sgd_sai,adamw", "--steps", "3"]
    done = cli(command, *given, "--out", out, "--device", "cpu", "--workers", "1")
    assert done.exit_code == 1 and len(calls) == 3 and len(load_runs(out)) == 2 and not list(out.rglob(".part-*"))
    assert done.output.splitlines()[-1] == f"Error: cannot write to {out}/digits-vit: No space left on device. {KEPT}"


@pytest.mark.parametrize("command", ["sweep", "compare"])
def test_folder_that_cannot_be_written_is_said_before_training(tmp_path, command, monkeypatch):
    monkeypatch.setattr("sgd_sai.experiments.attempts.train", lambda *_, **__: pytest.fail("trained"))
    disk = tmp_path / "disk"
    disk.mkdir()
    read_only = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True
    ).returncode
    if not read_only:
        disk.rmdir()
        disk.write_text("a file where a folder should be")
    try:
        done = cli(command, *([written(tmp_path)] if command == "sweep" else []), "--out", disk, "--device", "cpu")
        assert done.exit_code == 1
        assert [line for line in done.output.splitlines() if line] == [
            f"Error: cannot write to {disk}: " + ("Read-only file system" if read_only else "File exists")
        ]
    finally:
        if read_only:
            subprocess.run(["umount", "-l", str(disk)])


def test_what_killed_processes_left_is_swept_up_when_it_is_old(tmp_path):
    folder = tmp_path / "digits-vit"
    (folder / ".locks").mkdir(parents=True)
    old, young, lock = folder / ".part-old", folder / ".part-young", folder / ".locks" / "of a run that takes hours"
    for path in (old, young, lock):
        path.touch()
    for path in (old, lock):
        os.utime(path, (time.time() - 7200,) * 2)
    remove_partial_files(tmp_path)
    assert not old.exists() and lock.exists() and young.exists()


# --- several processes ------------------------------------------------------------------------------------------------


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)


def launched(launcher, *arguments):
    return started("-m", *launcher, "-m", "sgd_sai", *arguments, "--device", "cpu")


def test_two_processes_train_the_runs_of_one(tmp_path):
    "Data parallel, each with half of every batch, started by accelerate: the same loss at every step, to rounding."
    settings = ["compare", "--optimizers", "sgd_sai,adamw,adahessian", "--seeds", 1, "--steps", 20, "--out"]
    job = launched(ACCELERATE, *settings, tmp_path / "two")
    text = job.communicate(timeout=240)[0]
    assert job.returncode == 0 and text.count("SGD-SaI, seed 0") == 1, text  # one of them prints
    assert cli(*settings, tmp_path / "one", "--device", "cpu", "--workers", 1).exit_code == 0
    ones, twos = ({run["optimizer"]: run for run in load_runs(tmp_path / name)} for name in ("one", "two"))
    assert len(ones) == 3 and ones.keys() == twos.keys()
    for name, one in ones.items():
        two = twos[name]
        assert one["key"] == two["key"] and (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
        assert one["final"]["accuracy"] == two["final"]["accuracy"]
        for a, b in zip(one["history"], two["history"], strict=True):
            assert a["val_loss"] == pytest.approx(b["val_loss"], rel=2e-6) and (
                a["step"] == 0 or a["train_loss"] == pytest.approx(b["train_loss"], rel=2e-6)
            )


def test_batch_that_cannot_be_shared_out(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("sgd_sai.cli.train_commands.join_processes", lambda device: None)
    done = cli("compare", "--out", tmp_path, "--device", "cpu")
    assert done.exit_code == 2 and "64 cannot be shared out evenly among 3 processes" in " ".join(
        done.output.replace("│", "").split()
    )


def test_process_that_dies_ends_the_job_with_the_cause(tmp_path):
    file = written(tmp_path, steps=300)
    job = launched(TORCHRUN, "sweep", file, "--out", tmp_path / "runs")
    ranks, deadline = [], time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/*.json")) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    for process in psutil.Process(job.pid).children(recursive=True):
        ranks += [process] * (process.environ().get("RANK") == "1")
    ranks[0].send_signal(signal.SIGKILL)
    text = job.communicate(timeout=240)[0]
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in text and re.search(r"rank\s*:\s*1\b", text), text[-3000:]
    kept = len(load_runs(tmp_path / "runs"))
    assert 0 < kept < 8 and not list((tmp_path / "runs").rglob(".part-*"))


# --- Ray, trackers ----------------------------------------------------------------------------------------------------


PLUGIN = """
import torch
from sgd_sai.experiments.optimizer_entry import OptimizerEntry
from sgd_sai.experiments.optimizers import register_optimizer

register_optimizer(OptimizerEntry("my_sgd", torch.optim.SGD, settings={"momentum": 0.5}))
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    "A user's file with an optimizer, named by the environment; what it registers here is taken back."
    (tmp_path / "my_file.py").write_text(PLUGIN)
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, str(tmp_path / "my_file.py"))
    with patch.dict(OPTIMIZERS), patch.dict(plugins.PLUGIN_MODULES):
        plugins.load_plugins()
        yield


def test_ray_makes_the_files_of_the_local_engine(tmp_path, plugin):
    "Four settings and two batch sizes, one of the optimizers from a plugin, which Ray's processes load."
    pytest.importorskip("ray")
    grid = {"sgdm": {"lr": [0.1, 1e12]}, "my_sgd": {"lr": 0.05}}
    file = written(tmp_path, seeds=1, optimizers=["sgd_sai", "my_sgd", "sgdm"], grid=grid)
    local, far = tmp_path / "local", tmp_path / "ray"
    done = cli("sweep", file, "--out", far, "--device", "cpu", "--engine", "ray", "--workers", 2)
    assert done.exit_code == 0 and "8, of which 8 trained now" in done.output, done.output
    here = {run["key"]: run for run in run_sweep(read_sweep(file), local, device="cpu")["runs"]}
    there = {run["key"]: run for run in load_runs(far)}
    assert len(here) == 8 and here.keys() == there.keys()
    assert {path.name for path in far.glob("*/*.json")} == {path.name for path in local.glob("*/*.json")}
    for key, run in here.items():
        assert (run["status"], run["final"]) == (there[key]["status"], there[key]["final"])
    assert {run["status"] for run in here.values()} == {"finished", "diverged"}
    assert run_sweep(read_sweep(file), far, device="cpu", engine="ray")["trained"] == 0


def test_engines_and_trackers_that_do_not_go_together_or_are_missing(tmp_path, monkeypatch):
    file = written(tmp_path)
    for arguments, message in [
        (["--engine", "rai"], "unknown engine 'rai', did you mean ray"),
        (["--track", "tensorbord"], "unknown tracker 'tensorbord', did you mean tensorboard"),
        (["--engine", "ray", "--track", "tensorboard"], "--engine ray goes neither with --track"),
    ]:
        done = cli("sweep", file, "--out", tmp_path / "runs", *arguments)
        assert done.exit_code == 2 and message in " ".join(done.output.replace("│", "").split()), done.output
    monkeypatch.setitem(sys.modules, "ray", None)
    done = cli("sweep", file, "--out", tmp_path / "runs", "--engine", "ray")
    assert done.exit_code == 1 and "pip install -e '.[ray]'" in done.output
    monkeypatch.setattr("sgd_sai.experiments.trackers.importlib.util.find_spec", lambda name: None)
    done = cli("compare", "--out", tmp_path / "runs", "--track", "wandb")
    assert done.exit_code == 1 and "pip install -e '.[trackers]'" in done.output and not load_runs(tmp_path / "runs")


def test_tensorboard_has_what_the_run_file_has(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = cli(
        "compare",
        "--optimizers",
        "sgd_sai,adamw",
        "--seeds",
        "1",
        "--steps",
        "10",
        "--out",
        tmp_path,
        "--device",
        "cpu",
        "--track",
        "tensorboard",
        "--workers",
        "2",
    )
    assert done.exit_code == 0, done.output
    for run in load_runs(tmp_path):
        events = EventAccumulator(str(next(tmp_path.glob(f"tracking/digits-vit/*-{run['key']}/*"))))
        events.Reload()
        assert len(events.Scalars("train_loss")) == 10
        for name in ("val_loss", "accuracy"):
            seen = {event.step: event.value for event in events.Scalars(name)}
            assert seen == {
                point["step"]: pytest.approx(point[name], rel=1e-6) for point in run["history"] if point["step"]
            }
        means, steps = (
            [event.value for event in events.Scalars("train_loss")],
            [point["step"] for point in run["history"]],
        )
        for point, first in zip(run["history"][1:], steps[:-1], strict=True):
            assert sum(means[first : point["step"]]) / (point["step"] - first) == pytest.approx(
                point["train_loss"], rel=1e-5
            )


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    done = cli(
        "compare",
        "--optimizers",
        "sgd_sai",
        "--seeds",
        "1",
        "--steps",
        "4",
        "--out",
        tmp_path,
        "--device",
        "cpu",
        "--track",
        "wandb",
    )
    assert done.exit_code == 0, done.output
    (run,) = load_runs(tmp_path)
    (file,) = tmp_path.glob(f"tracking/digits-vit/*-{run['key']}/wandb/offline-run-*/run-{run['key']}.wandb")
    assert file.stat().st_size > 500
