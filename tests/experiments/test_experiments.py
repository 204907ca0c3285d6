"The comparison as a user meets it: resuming, divergence, wrong input, missing data, missing extras."

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from run_files import outcome
from typer.testing import CliRunner

from sgd_sai.cli.app import app
from sgd_sai.experiments.compare import compare, plan_runs, train_missing
from sgd_sai.experiments.optimizers import build_optimizer, optimizer_names
from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.runs import RunSpec, load_run, load_runs, run_path, save_run
from sgd_sai.experiments.tasks import text
from sgd_sai.experiments.tasks.registry import TASKS, get_task
from sgd_sai.experiments.train import batches, schedule, train


@pytest.fixture(scope="module")
def digits():
    task = get_task("digits-vit")
    return task, task.load()


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# --- interruption -------------------------------------------------------------------------------------------------

COMPARE = ["compare", "--seeds", "2", "--steps", "40", "--optimizers", "adamw,sgdm", "--device", "cpu"]


def test_interrupted_comparison_keeps_finished_runs_and_goes_on(tmp_path):
    "Ctrl-C; test_faults.py and test_sweeps.py have what is less polite."
    command = [sys.executable, "-m", "sgd_sai", *COMPARE, "--out", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores SIGINT
    )
    deadline = time.monotonic() + 120
    while (
        not (done := list(tmp_path.glob("digits-vit/*.json")))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    finished = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("digits-vit/*.json")}
    assert done and len(finished) < 4, output
    assert process.returncode == 130 and "goes on" in output and "Traceback" not in output

    again = CliRunner().invoke(app, [*COMPARE, "--out", str(tmp_path), "--workers", "1"])
    assert again.exit_code == 0, again.output
    assert len(list(tmp_path.glob("digits-vit/*.json"))) == 4
    assert all((tmp_path / "digits-vit" / name).stat().st_mtime_ns == when for name, when in finished.items())


def test_half_written_file_is_trained_again(tmp_path, digits):
    task, data = digits
    specs = plan_runs(task, data, ["adamw"], seeds=1, steps=2)
    path = run_path(tmp_path, specs[0])
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1, "key": ')
    with pytest.warns(UserWarning, match="not a readable run file"):
        runs = train_missing(task, data, specs, tmp_path, device="cpu")
    assert runs[0]["status"] == "finished" and json.loads(path.read_text())["key"] == specs[0].key


def test_fresh_trains_again(tmp_path, digits):
    task, data = digits
    specs = plan_runs(task, data, ["adamw"], seeds=1, steps=2)
    train_missing(task, data, specs, tmp_path, device="cpu")
    before = run_path(tmp_path, specs[0]).stat().st_mtime_ns
    train_missing(task, data, specs, tmp_path, device="cpu")
    assert run_path(tmp_path, specs[0]).stat().st_mtime_ns == before
    train_missing(task, data, specs, tmp_path, device="cpu", fresh=True)
    assert run_path(tmp_path, specs[0]).stat().st_mtime_ns > before


# --- divergence ---------------------------------------------------------------------------------------------------


def test_diverged_run_is_recorded_and_the_others_go_on(tmp_path, digits):
    task, _ = digits
    made = compare(task, tmp_path, ("sgdm", "adamw"), seeds=1, steps=25, changes={"sgdm": {"lr": 1e15}}, device="cpu")
    assert [run["status"] for run in made["runs"]] == ["diverged", "finished"]
    assert [run["status"] for run in load_runs(tmp_path)].count("diverged") == 1
    assert made["csv"].exists() and made["figure"].stat().st_size > 10_000
    frame = made["frame"].set_index("optimizer")
    assert frame.diverged["sgdm"] == 1 and frame.best_accuracy.isna()["sgdm"] and frame.best_accuracy["adamw"] > 0.2


def test_nan_gradient_with_finite_loss_is_divergence(digits):
    task, data = digits

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    def poisoned(model, batch):
        loss, right = task.loss(model, batch)
        return Poison.apply(loss), right

    record = train(replace(task, loss=poisoned), data, make_spec(task, data, "sgd_sai", steps=3), device="cpu")
    assert record["status"] == "diverged" and record["best"] == {}


# --- what a run is ------------------------------------------------------------------------------------------------


def test_same_seed_same_batches_for_every_optimizer(digits):
    task, data = digits
    streams = [batches(task, data, make_spec(task, data, name, seed=3)) for name in ("sgd_sai", "adamw")]
    for _ in range(40):  # more than an epoch
        (x, y), (u, v) = (next(stream) for stream in streams)
        assert torch.equal(x, u) and torch.equal(y, v)
    other = next(batches(task, data, make_spec(task, data, "adamw", seed=4)))
    assert not torch.equal(other[0], next(batches(task, data, make_spec(task, data, "adamw", seed=3)))[0])


def test_key_depends_on_everything_that_defines_a_run(digits):
    task, data = digits
    spec = make_spec(task, data, "adamw")
    changed = dict(
        task="x",
        optimizer="sgdm",
        hyperparameters={"lr": 1.0},
        seed=9,
        steps=9,
        batch_size=9,
        warmup=9,
        clip=None,
        precision="bf16",
        data="x",
    )
    assert set(changed) == set(RunSpec.__dataclass_fields__)
    keys = {spec.key} | {replace(spec, **{name: value}).key for name, value in changed.items()}
    assert len(keys) == 1 + len(changed)


def test_run_file_round_trip(tmp_path, digits):
    task, data = digits
    spec = make_spec(task, data, "adamw")
    save_run(tmp_path, spec, outcome(history=[{"step": 0, "train_loss": None}]))
    run = load_run(tmp_path, spec)
    assert (
        run["key"] == spec.key
        and run["hyperparameters"] == spec.hyperparameters
        and run["history"][0]["train_loss"] is None
    )


@pytest.mark.parametrize("name", [*optimizer_names(), "po:Lion", "po:Prodigy"])
def test_every_optimizer_learns_something(name, digits):
    task, data = digits
    record = train(
        task, data, make_spec(task, data, name, steps=60, **({"lr": 3e-4} if name == "po:Lion" else {})), device="cpu"
    )
    assert record["status"] == "finished"
    assert record["final"]["val_loss"] < record["history"][0]["val_loss"]
    assert (
        record["state_bytes"] > 0
        and record["ms_per_step"]["low"] <= record["ms_per_step"]["median"] <= record["ms_per_step"]["high"]
    )


def test_decay_acts_on_matrices_alone():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    opt = build_optimizer("adamw", net, {"lr": 0.1, "weight_decay": 0.5})
    decay = {id(p): group["weight_decay"] for group in opt.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in net.parameters()] == [0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["digits-vit", "pydoc-gpt"])
def test_tasks_load_build_and_score(name):
    task = TASKS[name]
    data = task.load()
    loss, _ = task.loss(task.build(data.sizes), next(batches(task, data, make_spec(task, data, "sgd_sai"))))
    chance = torch.tensor(float(data.sizes.get("vocab_size", 10))).log()
    assert abs(loss.item() - chance) < 0.5


def test_mixed_precision_trains_and_does_not_stay(digits):
    "The precision of a run is its own, though `accelerate` has one state per process."
    task, data = digits
    specs = {precision: make_spec(task, data, "sgd_sai", steps=30, precision=precision) for precision in ("no", "bf16")}
    records = [train(task, data, specs[precision], device="cpu") for precision in ("no", "bf16", "no")]
    assert all(run["status"] == "finished" for run in records)
    assert all(run["final"]["val_loss"] < run["history"][0]["val_loss"] for run in records)
    assert records[0]["final"] == records[2]["final"] != records[1]["final"]


def test_schedule_ends_at_a_tenth():
    assert [schedule(i, 10, 2) for i in (0, 1, 2)] == [1 / 3, 2 / 3, 1.0] and schedule(10, 10, 2) == pytest.approx(0.1)


# --- wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, said", [
    (["compare", "digit-vit"], "did you mean digits-vit"),
    (["compare", "--optimizers", "adamv"], "did you mean adamw"),
    (["compare", "--optimizers", "po:Lionn"], "lion"),
    (["compare", "--set", "adamw.beta=1"], "unknown hyperparameter"),
    (["compare", "--set", "adamw.lr=-1"], "Invalid learning rate"),
    (["compare", "--set", "nonsense"], "OPTIMIZER.HYPERPARAMETER"),
    (["compare", "--device", "tpu"], "unknown device"),
    (["compare", "--precision", "fp8"], "unknown precision"),
    (["gsnr", "nothing"], "digits-vit"),
    (["speed", "gtp2"], "did you mean gpt2"),
])  # fmt: skip
def test_wrong_input_ends_with_2_and_says_what_would_be_right(arguments, said, tmp_path):
    result = cli(*arguments, *(["--out", tmp_path / "out"] if arguments[0] == "compare" else []))
    words = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and said in words, result.output
    assert not list(tmp_path.rglob("*.json"))


def test_folder_that_cannot_be_written_is_said_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("sgd_sai.experiments.attempts.train", lambda *_, **__: pytest.fail("trained"))
    result = cli("compare", "--out", tmp_path / "file" / "runs")
    assert result.exit_code == 1 and "cannot write to" in result.output


def test_missing_data_says_which_file_and_where(tmp_path, monkeypatch):
    monkeypatch.setitem(text.SHAKESPEARE_FILE, "url", "http://127.0.0.1:9/input.txt")
    result = cli("compare", "shakespeare-gpt", "--data", tmp_path / "data", "--out", tmp_path / "out")
    words = result.output.replace("\n", "")
    assert result.exit_code == 1
    assert (
        "tinyshakespeare.txt" in words and str((tmp_path / "data").resolve()) in words and "http://127.0.0.1:9" in words
    )


def test_wrong_data_file_is_refused(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be")
    with pytest.raises(FileNotFoundError, match="not the expected file"):
        text.load_shakespeare(tmp_path)


def test_text_is_split_without_overlap():
    data = text.split_text(torch.arange(1000), block=8, vocab_size=1000, fingerprint="x")
    train_tokens = {t for i in range(len(data.train)) for t in data.train[i][1].tolist()}
    val_tokens = [t for i in range(len(data.val)) for t in data.val[i][0].tolist()]
    assert max(train_tokens) < min(val_tokens) and len(val_tokens) == len(set(val_tokens))


# --- with less installed ------------------------------------------------------------------------------------------

EXTRAS = [
    "transformers",
    "torchvision",
    "accelerate",
    "sklearn",
    "pandas",
    "matplotlib",
    "seaborn",
    "typer",
    "rich",
    "pytorch_optimizer",
    "fastcore",
    "nbdev",
]


def without_extras(code):
    "Run `code` where importing any extra fails."
    blocked = f"import sys\nfor name in {EXTRAS!r}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True)


def test_import_and_step_with_torch_alone():
    done = without_extras("""
import torch, sgd_sai
net = torch.nn.Linear(3, 2)
net(torch.ones(1, 3)).sum().backward()
sgd_sai.SGDSaI(net.named_parameters()).step()
print(sgd_sai.gsnr_table(net))
""")
    assert done.returncode == 0 and "weight" in done.stdout, done.stderr


def test_command_line_without_extras_names_the_command_that_installs_them():
    done = without_extras("import runpy; runpy.run_module('sgd_sai', run_name='__main__')")
    assert done.returncode == 1 and "pip install -e '.[experiments]'" in done.stderr and "Traceback" not in done.stderr


def test_namesake_beside_us_gives_one_warning():
    done = subprocess.run([sys.executable, "-W", "always", "-c", """
import importlib.metadata as m
real = m.version
m.version = lambda name: '1.0.3' if name == 'sgd-sai' else real(name)
import sgd_sai, sgd_sai.gsnr
"""], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and done.stderr.count("pip uninstall sgd-sai") == 1, done.stderr
