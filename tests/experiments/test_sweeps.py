"Tasks whose data cannot be had here, on fabricated files of the same form; sweeps, costs, second derivatives."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torchvision
from typer.testing import CliRunner

import sgd_sai.experiments.attempts as attempts
import sgd_sai.experiments.train as training
from sgd_sai.benchmarks.training_step import step_costs
from sgd_sai.cli.app import app
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.random_search import draw_settings, read_ranges
from sgd_sai.experiments.repeat import repeat_run
from sgd_sai.experiments.run_specs import epoch_steps, make_spec
from sgd_sai.experiments.runs import load_runs, run_path, save_run, spec_of
from sgd_sai.experiments.sweep import Sweep, expand, read_sweep, run_sweep
from sgd_sai.experiments.sweep_results import recorded_runs, sweep_frame
from sgd_sai.experiments.tasks.registry import get_task
from sgd_sai.experiments.tasks.task import Data
from sgd_sai.experiments.train import batches, schedule, train

SWEEPS, RESULTS = (Path(__file__).resolve().parents[2] / name for name in ("sweeps", "results"))


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# --- data of the same form: see the fixtures in conftest.py -----------------------------------------------------------


@pytest.mark.parametrize("name", ["fashion-vit", "fashion-resnet"])
def test_fashion_tasks_load_and_train_with_every_kind_of_step(fashion, name):
    task = get_task(name)
    data = task.load(fashion)
    assert (len(data.train), len(data.val)) == (96, 32) and data.train[0][0].shape == (1, 28, 28)
    for optimizer in ("sgd_sai", "adan", "adahessian"):
        run = train(task, data, make_spec(task, data, optimizer, steps=3, batch_size=32), device="cpu")
        assert run["status"] == "finished" and len(run["history"]) > 1


def test_cifar_recipe_loads_crops_and_steps_down(cifar):
    task = get_task("cifar10-resnet20")
    data = task.load(cifar)
    assert (len(data.train), len(data.val)) == (500, 100)
    assert epoch_steps(Data(range(50_000), [], {}, ""), 160, 256) == task.steps == 31250
    assert [
        schedule(s, task.steps, 0, milestones=task.milestones) for s in (0, 15624, 15625, 23437, 23438)
    ] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert any(not torch.equal(data.train[0][0], data.train[0][0]) for _ in range(5)) and torch.equal(
        data.val[0][0], data.val[0][0]
    )
    spec = make_spec(task, data, "sgdm", steps=4, batch_size=32)
    first, second = batches(task, data, spec), batches(task, data, spec)
    for _ in range(3):
        x, y = next(first)
        torch.rand(3)  # an optimizer that draws numbers must not change the pictures
        again = next(second)
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    run = train(task, data, make_spec(task, data, "adahessian", steps=2, batch_size=32), device="cpu")
    assert run["status"] == "finished" and run["parameters"] == 272_474


@pytest.mark.parametrize(
    "name, file", [("fashion-vit", "train-images-idx3-ubyte"), ("cifar10-resnet20", "data_batch_1")]
)
def test_missing_torchvision_data_says_which_files_and_where(tmp_path, monkeypatch, name, file):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", offline)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(FileNotFoundError, match=file) as error:
        get_task(name).load(tmp_path)
    assert str(tmp_path.resolve()) in str(error.value) and "--data" in str(error.value)


# --- sweeps -----------------------------------------------------------------------------------------------------------

SMALL = dict(task="digits-vit", optimizers=["sgd_sai", "adamw"], seeds=1, steps=3, batch_size=[32, 64])


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_sweeps_of_this_repository_can_be_read_and_expanded(path):
    sweep = read_sweep(path)
    fingerprint = next((run["data"] for run in load_runs(RESULTS, sweep.task)), "")
    data = Data(range(1438 if "digits" in path.read_text() else 60_000), [], {}, fingerprint)
    try:
        specs = expand(sweep, data, RESULTS)
    except UsageError as e:  # a sweep that waits for another; the first of all can be expanded
        assert sweep.best_of and "train that sweep first" in str(e)
        while sweep.best_of:
            sweep = sweep.best_of
        specs = expand(sweep, data)
    assert len(specs) == len({spec.key for spec in specs}) > 1


def test_lr_follows_the_rule():
    data = Data(range(60_000), [], {}, "")
    for rule, power in (("none", 0), ("sqrt", 0.5), ("linear", 1)):
        sweep = Sweep(
            "fashion-vit",
            ["adan"],
            seeds=1,
            epochs=1,
            batch_size=[32, 128, 512],
            lr_rule=rule,
            grid={"adan": {"lr": 0.01}},
        )
        found = {spec.batch_size: (spec.hyperparameters["lr"], spec.steps) for spec in expand(sweep, data)}
        assert found == {
            size: (pytest.approx(0.01 * (size / 128) ** power, rel=1e-5), 60_000 // size) for size in (32, 128, 512)
        }


def test_failed_run_is_one_line_and_the_others_are_trained(tmp_path, monkeypatch):
    def failing(task, data, spec, device, *more, **options):
        if spec.optimizer == "adamw" and spec.batch_size == 64:
            raise RuntimeError("the disk\nis on fire")
        return train(task, data, spec, device, *more, **options)

    monkeypatch.setattr(attempts, "train", failing)
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(SMALL))  # JSON is YAML
    done = cli("sweep", file, "--out", tmp_path / "runs", "--device", "cpu")
    lines = [line for line in done.output.splitlines() if "FAILED" in line]
    assert (
        done.exit_code == 1
        and len(lines) == 1
        and "RuntimeError: the disk is on fire" in lines[0]
        and "AdamW" in lines[0]
    )
    assert len(load_runs(tmp_path / "runs")) == 3
    with pytest.raises(FileNotFoundError, match="1 of 4 runs"):
        recorded_runs(file, tmp_path / "runs", items=1438)
    monkeypatch.undo()
    done = cli("sweep", file, "--out", tmp_path / "runs", "--device", "cpu")
    assert done.exit_code == 0 and "4, of which 1 trained now" in done.output
    frame = sweep_frame(get_task("digits-vit"), recorded_runs(file, tmp_path / "runs", items=1438))
    assert len(frame) == 4 and frame.final.notna().all()


def test_killed_sweep_takes_its_workers_along_and_goes_on(tmp_path):
    "By SIGKILL; SIGTERM, which nobody handles, does the same."
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps({**SMALL, "seeds": 2, "steps": 12}))
    command = [
        sys.executable,
        "-m",
        "sgd_sai",
        "sweep",
        str(file),
        "--out",
        str(tmp_path),
        "--workers",
        "2",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while (
        not (done := list(tmp_path.glob("digits-vit/*.json")))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=10)[1]
    finished = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("digits-vit/*.json")}
    assert done and len(finished) < 8
    made = run_sweep(read_sweep(file), tmp_path, device="cpu")
    assert len(made["runs"]) == 8 and made["trained"] == 8 - len(finished) and not made["failures"]
    assert all((tmp_path / "digits-vit" / name).stat().st_mtime_ns == when for name, when in finished.items())


# --- second derivatives -----------------------------------------------------------------------------------------------


def test_curvature_that_is_not_finite_is_divergence(monkeypatch):
    task = get_task("digits-vit")
    data = task.load()

    def not_finite(*args):
        raise FloatingPointError("the curvature of x is not finite")

    monkeypatch.setattr("sgd_sai.adahessian._curvature", not_finite)
    run = train(task, data, make_spec(task, data, "adahessian", steps=3), device="cpu")
    assert run["status"] == "diverged" and run["final"] == {}


def test_second_derivatives_in_half_precision_are_refused_before_training(tmp_path):
    done = cli("compare", "--optimizers", "sgdm,adahessian", "--precision", "fp16", "--out", tmp_path)
    assert done.exit_code == 2 and "bf16" in done.output and not load_runs(tmp_path)


def test_second_derivatives_in_bfloat16_train():
    task = get_task("digits-vit")
    data = task.load()
    run = train(task, data, make_spec(task, data, "adahessian", steps=4, precision="bf16"), device="cpu")
    assert run["status"] == "finished"


def test_graph_is_kept_for_those_who_need_it_and_for_nobody_else(monkeypatch):
    task, seen = get_task("digits-vit"), {}
    data = task.load()
    original = training.one_step

    def watched(run, batch, graph, *more):
        seen.setdefault(type(run.bare_optimizer).__name__, []).append(graph)
        return original(run, batch, graph, *more)

    monkeypatch.setattr(training, "one_step", watched)
    for name, changes in (("adamw", {}), ("adahessian", {"update_period": 3})):
        train(task, data, make_spec(task, data, name, steps=5, **changes), device="cpu")
    assert seen == {"AdamW": [False] * 5, "AdaHessian": [True, False, False, True, False]}


def test_cost_of_a_step_counts_the_graph():
    task = get_task("digits-vit")
    record = step_costs(task, task.load(), ["sgdm", "adamw", "adahessian"], rounds=3, device="cpu")
    cost = record["optimizers"]
    assert cost["sgdm"]["ratio"] == {"median": 1, "low": 1, "high": 1} and cost["adahessian"]["ratio"]["median"] > 0
    assert cost["adahessian"]["peak_bytes"] > 1.5 * cost["sgdm"]["peak_bytes"] > 4 * record["parameters"]
    assert cost["adamw"]["state_bytes"] > 1.9 * cost["sgdm"]["state_bytes"]


def test_unknown_keys_of_a_sweep_are_named(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("task: digits-vit\noptimizers: [adamw]\nepoch: 3\n")
    with pytest.raises(UsageError, match="did you mean epochs"):
        read_sweep(file)
    done = cli("sweep", file, "--out", tmp_path)
    assert done.exit_code == 2 and "did you mean epochs" in " ".join(done.output.split())
    assert not run_path(tmp_path, make_spec(get_task("digits-vit"), Data(range(100), [], {}, ""), "adamw")).exists()


# --- fewer bits -----------------------------------------------------------------------------------------------------


def test_a_sweep_can_ask_for_fewer_bits():
    task = get_task("digits-vit")
    data = task.load()
    specs = expand(
        Sweep(
            task.name,
            ["sgd_sai"],
            seeds=1,
            steps=2,
            precision="bf16-true",
            grid={"sgd_sai": {"state_dtype": [None, "int8"], "rounding": "kahan"}},
        ),
        data,
    )
    assert {spec.precision for spec in specs} == {"bf16-true"} and {
        spec.hyperparameters.get("state_dtype", "left out") for spec in specs
    } == {"left out", "int8"}
    plain = expand(Sweep(task.name, ["sgd_sai"], seeds=1, steps=2, grid={"sgd_sai": {"state_dtype": [None]}}), data)
    assert [spec.key for spec in plain] == [
        make_spec(task, data, "sgd_sai", steps=2).key
    ]  # null is the default, and the same run
    with pytest.raises(UsageError, match="unknown precision 'bf16-tru', did you mean bf16-true"):
        Sweep(task.name, ["sgd_sai"], precision="bf16-tru")
    with pytest.raises(UsageError, match="sgd_sai.state_dtype: .*'bfloat61'"):
        expand(Sweep(task.name, ["sgd_sai"], grid={"sgd_sai": {"state_dtype": "bfloat61"}}), data)


@pytest.mark.parametrize(
    "name, changes",
    [("digits-vit", dict(rounding="stochastic", state_dtype="int8")), ("pydoc-gpt", dict(rounding="kahan"))],
)
def test_parameters_in_bfloat16_train_and_the_loss_is_float32(name, changes, monkeypatch):
    task = get_task(name)
    data = task.load()
    if name == "pydoc-gpt":
        data = data._replace(val=torch.utils.data.Subset(data.val, range(8)))
    seen = []
    monkeypatch.setattr(
        training, "build_optimizer", lambda *args, build=training.build_optimizer: seen.append(args[1]) or build(*args)
    )
    spec = make_spec(task, data, "sgd_sai", steps=6, precision="bf16-true", batch_size=8, **changes)
    runs = [train(task, data, spec, "cpu") for _ in range(2)]
    assert {p.dtype for p in seen[0].parameters()} == {torch.bfloat16}
    assert (
        runs[0]["status"] == "finished"
        and runs[0]["history"][-1]["train_loss"] < 1.2 * runs[0]["history"][0]["val_loss"]
    )
    assert runs[0]["final"] == runs[1]["final"]  # repeated exactly
    loss = runs[0]["final"]["val_loss"]
    assert float(torch.tensor(loss).bfloat16()) != pytest.approx(loss, rel=1e-6)  # more digits than bfloat16 has


def test_best_of_repeats_the_best_cell(tmp_path):
    "A sweep that names another takes each optimizer's best setting there; without its runs it says that it is first."
    (tmp_path / "tune.yaml").write_text(
        "task: digits-vit\noptimizers: [sgd_sai, adamw]\nseeds: 1\nsteps: 12\ngrid:\n"
        "  sgd_sai: {lr: [0.00001, 0.02]}\n  adamw: {lr: [0.003, 0.00001], betas: [[0.9, 0.99]]}\n"
    )
    (tmp_path / "again.yaml").write_text(
        "task: digits-vit\noptimizers: [adamw, sgd_sai]\nseeds: 2\nsteps: 8\nbest_of: tune.yaml\n"
    )
    folder, data = tmp_path / "runs", get_task("digits-vit").load()
    with pytest.raises(UsageError, match="4 of the 4 runs"):
        run_sweep(read_sweep(tmp_path / "again.yaml"), folder, device="cpu")
    run_sweep(read_sweep(tmp_path / "tune.yaml"), folder, device="cpu")
    runs = run_sweep(read_sweep(tmp_path / "again.yaml"), folder, device="cpu")["runs"]
    assert [(run["optimizer"], run["seed"], run["steps"], run["hyperparameters"]["lr"]) for run in runs] == [
        ("adamw", 0, 8, 0.003),
        ("sgd_sai", 0, 8, 0.02),
        ("adamw", 1, 8, 0.003),
        ("sgd_sai", 1, 8, 0.02),
    ]
    assert [run["key"] for run in recorded_runs(tmp_path / "again.yaml", folder, len(data.train))] == [
        run["key"] for run in runs
    ]
    best = next(
        run
        for run in load_runs(folder)
        if run["optimizer"] == "sgd_sai" and run["steps"] == 12 and run["hyperparameters"]["lr"] == 0.02
    )
    path = (
        folder / "digits-vit" / f"{best['key']}.json"
    )  # the choice follows the files: the best run gone wrong is not chosen
    path.write_text(json.dumps(best | {"status": "diverged"}))
    assert {
        spec.hyperparameters["lr"]
        for spec in expand(read_sweep(tmp_path / "again.yaml"), data, folder)
        if spec.optimizer == "sgd_sai"
    } == {0.00001}


# --- random search, shortlists ---------------------------------------------------------------------------------------

RANGES = {"lr": [0.001, 0.1], "lr*weight_decay": [1e-4, 1e-2]}


def test_drawn_settings_are_halton_points_on_logarithms():
    "Points 1 to 3: 1/2, 1/4, 3/4 in base 2 and 1/3, 2/3, 1/9 in base 3; the third coordinate is 1/5, 2/5, 3/5."
    ranges = read_ranges("muon_sai", RANGES | {"rest_lr/lr": [0.1, 3.2], "eps": [1e-8, 1e-8]})
    drawn = draw_settings(ranges, 3)
    for setting, x, y, z in zip(
        drawn, (1 / 2, 1 / 4, 3 / 4), (1 / 3, 2 / 3, 1 / 9), (1 / 5, 2 / 5, 3 / 5), strict=True
    ):
        lr = 0.001 * 100**x
        expected = {"lr": lr, "weight_decay": 1e-4 * 100**y / lr, "rest_lr": lr * 0.1 * 32**z, "eps": 1e-8}
        assert setting == pytest.approx(expected, rel=0.006)
        assert all(value == float(f"{value:.3g}") for value in setting.values())
    assert draw_settings(ranges, 2) == drawn[:2]


def test_optimizers_that_share_muon_are_searched_at_the_same_matrices():
    for path in sorted(SWEEPS.glob("*/search.yaml")):
        sweep = read_sweep(path)
        muons = [name for name in sweep.optimizers if name.startswith("muon")]
        settings = {name: draw_settings(sweep.random[name], sweep.cells) for name in muons}
        shared = {name: [(s["lr"], s["weight_decay"]) for s in drawn] for name, drawn in settings.items()}
        assert len(muons) > 1 and len({str(pairs) for pairs in shared.values()}) == 1, path
        assert {name for name in sweep.random} == set(sweep.optimizers)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(random={"adamw": {"lr": [0.1, 0.01]}}), "lr of adamw: .* is not .low, high."),
        (dict(random={"adamw": {"lr": [0.01, 0.1, 1]}}), "lr of adamw"),
        (dict(random={"adamw": {"weight_decay": [0.01, 0.1]}}), "is not a mapping with a range for lr"),
        (dict(random={"adamw": {"lr": [0.01, 0.1], "lr*lr/lr": [0.01, 0.1]}}), "neither a hyperparameter"),
        (dict(random={"sgdm": RANGES}), "unknown optimizer in random 'sgdm'"),
        (dict(random=[1]), "random: .1. is not a mapping"),
        (dict(cells=0), "cells: 0 is not a positive whole number"),
        (dict(top=[1, 2]), "top is the number of top"),
        (dict(first_seed=-1), "first_seed: -1 is not a whole number from 0"),
        (dict(first_seed=1.5), "first_seed: 1.5"),
        (dict(curve=0), "curve: 0 is neither true nor false"),
    ],
)
def test_what_is_wrong_with_a_search_is_said(wrong, words):
    with pytest.raises(UsageError, match=words):
        Sweep("digits-vit", ["adamw"], **wrong)


def test_a_shortlist_takes_the_best_settings_and_its_own_seeds(tmp_path):
    task = get_task("digits-vit")
    data = task.load()
    search = Sweep("digits-vit", ["adamw"], seeds=1, first_seed=7, steps=2, random={"adamw": RANGES}, cells=3)
    specs = expand(search, data)
    assert len(specs) == 3 and {spec.seed for spec in specs} == {7}
    for spec in specs:
        run = train(task, data, spec, device="cpu")
        accuracy = {0.01: 0.5, 0.00316: 0.9, 0.0316: 0.7}[spec.hyperparameters["lr"]]
        save_run(tmp_path, spec, run | {"final": {"accuracy": accuracy, "val_loss": 1.0}})
    shortlist = Sweep("digits-vit", ["adamw"], seeds=2, first_seed=7, steps=3, best_of=search, top=2)
    chosen = expand(shortlist, data, tmp_path)
    assert [(spec.hyperparameters["lr"], spec.seed) for spec in chosen] == [
        (0.00316, 7),
        (0.0316, 7),
        (0.00316, 8),
        (0.0316, 8),
    ]
    single = Sweep("digits-vit", ["adamw"], seeds=1, steps=3, best_of=search)
    assert [spec.hyperparameters["lr"] for spec in expand(single, data, tmp_path)] == [0.00316]


@pytest.mark.parametrize("name", ["sgd_sai", "adahessian"])
def test_a_run_without_a_curve_ends_as_one_with_it(tmp_path, name):
    "And is repeated as it was made. AdaHessian draws random numbers in its steps."
    grid = {name: {"lr": [0.01]}}
    ends, points = [], []
    for curve in (True, False):
        sweep = Sweep("digits-vit", [name], seeds=1, steps=48, grid=grid, curve=curve)
        (run,) = run_sweep(sweep, tmp_path / str(curve), device="cpu")["runs"]
        ends.append((run["final"], run["history"][0], run["history"][-1]["val_loss"]))
        points.append([point["step"] for point in run["history"]])
    assert ends[0] == ends[1] and points == [[*range(0, 49, 4)], [0, 48]]
    old, new = repeat_run(run_path(tmp_path / "False", spec_of(run)), device="cpu")
    assert new["final"] == old["final"] and [point["step"] for point in new["history"]] == [0, 48]
