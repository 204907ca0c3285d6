"What people type, and files that are not what they should be: one line of error and exit code 2, never a traceback."

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from run_files import outcome
from typer.testing import CliRunner

from sgd_sai.cli.app import COMMANDS, app
from sgd_sai.experiments.choices import check_device
from sgd_sai.experiments.compare import plan_runs, summary_frame
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.hyperparameters import parse_hyperparameters
from sgd_sai.experiments.optimizers import build_optimizer
from sgd_sai.experiments.pack import pack, pack_runs, unpack_runs
from sgd_sai.experiments.precision import make_accelerator
from sgd_sai.experiments.run_records import run_problem
from sgd_sai.experiments.run_specs import MAX_RUNS, check_spec, make_spec, spec_with
from sgd_sai.experiments.runs import history_frame, load_run, load_runs, read_run, run_frame, run_path, save_run
from sgd_sai.experiments.strict_json import from_json, to_json
from sgd_sai.experiments.sweep import Sweep, expand, read_sweep
from sgd_sai.experiments.sweep_results import sweep_frame
from sgd_sai.experiments.tasks.registry import get_task
from sgd_sai.experiments.tasks.task import Data
from sgd_sai.experiments.train import train

TASK = get_task("digits-vit")
DATA = Data(range(1438), range(359), {}, "0" * 12)
SPEC = make_spec(TASK, DATA, "adamw")


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def words(done):
    return " ".join(done.output.replace("│", " ").split())


def refused(done, said, exit_code=2):
    assert done.exit_code == exit_code and isinstance(done.exception, SystemExit), done.output
    assert said in words(done) and "Errno" not in done.output, done.output


# --- run files that are JSON and no run -------------------------------------------------------------------------------

NO_RUNS = {
    "null": None,
    "a list": [1, 2],
    "a number": 7,
    "a text": "run",
    "an empty mapping": {},
    "another schema": {"schema": 2},
    "final is a list": {"final": [0.5]},
    "final is null": {"final": None},
    "final holds text": {"final": {"val_loss": "low"}},
    "best is a number": {"best": 0.5},
    "best has no loss": {"best": {}},
    "history is a mapping": {"history": {"step": 0}},
    "history is empty": {"history": []},
    "history holds numbers": {"history": [0, 1]},
    "history without steps": {"history": [{"val_loss": 0.5}]},
    "history that does not begin": {"history": [{"step": 7, "val_loss": 0.5}]},
    "ms_per_step is a number": {"ms_per_step": 9.0},
    "ms_per_step without quartiles": {"ms_per_step": {"median": 9.0}},
    "hyperparameters are a list": {"hyperparameters": ["lr"]},
    "hyperparameters are text": {"hyperparameters": "lr=1"},
    "seed is text": {"seed": "0"},
    "steps are true": {"steps": True},
    "state_bytes are negative": {"state_bytes": -1},
    "status is unknown": {"status": "done"},
    "environment is null": {"environment": None},
    "environment without threads": {"environment": {}},
    "optimizer is a number": {"optimizer": 3},
}


def written_over(folder, change):
    "A run file that is damaged, beside one that is not."
    path = save_run(folder, SPEC, outcome())
    save_run(folder, make_spec(TASK, DATA, "adamw", seed=1), outcome())
    whole = isinstance(change, dict) and change and "schema" not in change
    path.write_text(json.dumps(json.loads(path.read_text()) | change if whole else change))
    return path


@pytest.mark.parametrize("change", NO_RUNS.values(), ids=NO_RUNS)
def test_a_file_that_is_no_run_is_ignored_with_a_warning_that_names_it(tmp_path, change):
    path = written_over(tmp_path, change)
    with pytest.warns(UserWarning, match=f"{path.stem}.json is not a readable run file and is ignored"):
        assert load_run(tmp_path, SPEC) is None
    with pytest.warns(UserWarning, match=path.stem):
        runs = load_runs(tmp_path)
    assert [run["seed"] for run in runs] == [1]
    assert len(run_frame(runs)) == len(sweep_frame(TASK, runs)) == len(summary_frame(TASK, runs)) == 1
    assert len(history_frame(runs)) == 2


@pytest.mark.parametrize("change", NO_RUNS.values(), ids=NO_RUNS)
def test_a_line_that_is_no_run_is_ignored_by_readers_and_refused_by_pack(tmp_path, change):
    path = written_over(tmp_path, change)
    line = json.dumps(json.loads(path.read_text()))
    packed = tmp_path / "digits-vit.jsonl"
    packed.write_text(line + "\n")
    path.unlink()
    with pytest.warns(UserWarning, match="line 1 of .*digits-vit.jsonl is not a readable run file"):
        assert len(load_runs(tmp_path)) == 1
    for command in (pack_runs, unpack_runs):
        with pytest.raises(UsageError, match="line 1"):
            command(tmp_path)
    assert packed.read_text() == line + "\n"


@pytest.mark.parametrize("change", NO_RUNS.values(), ids=NO_RUNS)
def test_a_file_that_is_no_run_is_not_repeated(tmp_path, change):
    refused(cli("repeat", written_over(tmp_path, change)), "is no run file")


def test_a_sweep_trains_again_what_is_no_run(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("task: digits-vit\noptimizers: [sgdm]\nseeds: 1\nsteps: 2\n")
    assert cli("sweep", file, "--out", tmp_path / "runs", "--device", "cpu").exit_code == 0
    (path,) = tmp_path.glob("runs/*/*.json")
    path.write_text("null")
    with pytest.warns(UserWarning, match=path.stem):
        done = cli("sweep", file, "--out", tmp_path / "runs", "--device", "cpu")
    assert done.exit_code == 0 and "1, of which 1 trained now" in words(done)
    assert run_problem(json.loads(path.read_text())) == ""


def test_the_file_of_another_run_is_not_taken_for_this_one(tmp_path):
    other = save_run(tmp_path, make_spec(TASK, DATA, "adamw", seed=1), outcome())
    other.rename(run_path(tmp_path, SPEC))
    with pytest.warns(UserWarning, match="is the file of another run"):
        assert load_run(tmp_path, SPEC) is None


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"{", b""])
def test_bytes_that_are_no_text_are_ignored_with_a_warning(tmp_path, content):
    path = written_over(tmp_path, None)
    path.write_bytes(content)
    (tmp_path / "digits-vit.jsonl").write_bytes(content + b"\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_run(tmp_path, SPEC) is None and len(load_runs(tmp_path)) == 1
    assert path.stem in str(caught[0].message) and "line 1 of" in str(caught[1].message)
    refused(cli("repeat", path), "is no run file")


def test_records_of_other_kinds_are_no_runs_and_no_reason_to_warn(tmp_path, recwarn):
    save_run(tmp_path, SPEC, outcome())
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "gpt2.json").write_text("null")
    assert len(load_runs(tmp_path)) == 1 and not recwarn


def test_packing_never_leaves_the_folder(tmp_path):
    "A line that names another task, or a task that names another folder, writes nothing elsewhere."
    folder = tmp_path / "runs"
    save_run(folder, SPEC, outcome())
    pack_runs(folder)
    packed = folder / "digits-vit.jsonl"
    packed.write_text(packed.read_text().replace('"task": "digits-vit"', '"task": "../out"'))
    with pytest.raises(UsageError, match="its task is '../out'"):
        unpack_runs(folder)
    (tmp_path / "other.jsonl").write_text("")
    assert unpack_runs(folder, "../other") == [] and pack_runs(folder, "../runs/digits-vit") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.jsonl", "runs"]


# --- numbers that JSON does not have ----------------------------------------------------------------------------------


def strict(text):
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"bare {word}"))


def test_a_diverged_run_is_written_as_strict_json_and_comes_back(tmp_path):
    nan, inf = float("nan"), float("inf")
    history = [{"step": 0, "seconds": 0.0, "train_loss": None, "val_loss": inf}, {"step": 9, "val_loss": nan}]
    path = save_run(tmp_path, SPEC, outcome(status="diverged", best={}, final={}, history=history))
    assert strict(path.read_text())["history"][1]["val_loss"] == "NaN"
    (packed,) = pack_runs(tmp_path)
    strict(packed.read_text())
    for run in (load_run(tmp_path, SPEC), load_runs(tmp_path)[0], read_run(f"{packed}#{SPEC.key}")):
        first, last = run["history"]
        assert first["val_loss"] == inf and last["val_loss"] != last["val_loss"] and first["train_loss"] is None
    frame = history_frame(load_runs(tmp_path))
    assert frame.val_loss.dtype == float and frame.val_loss.isna().tolist() == [False, True]
    assert unpack_runs(tmp_path) and strict(path.read_text()) and not packed.exists()


def test_bare_words_of_older_files_are_read(tmp_path):
    path = save_run(tmp_path, SPEC, outcome(seconds=float("inf")))
    path.write_text(path.read_text().replace('"Infinity"', "Infinity"))
    assert load_run(tmp_path, SPEC)["seconds"] == float("inf")
    assert strict(pack([load_run(tmp_path, SPEC)]))["seconds"] == "Infinity"


def test_what_a_training_that_diverges_writes_is_strict_json(tmp_path):
    data = TASK.load()
    spec = make_spec(TASK, data, "sgdm", steps=20, lr=1e15)
    record = train(TASK, data, spec, device="cpu")
    record["history"].append({"step": 20, "val_loss": float("nan")})
    assert record["status"] == "diverged" and strict(save_run(tmp_path, spec, record).read_text())


@pytest.mark.parametrize("value", [{"a": (1, [float("-inf")])}, [None, True, "text", 3, 0.5]])
def test_json_there_and_back(value):
    assert from_json(to_json(value)) == json.loads(json.dumps(value))


# --- sweep files ------------------------------------------------------------------------------------------------------

GOOD = "task: digits-vit\noptimizers: [sgd_sai]\nseeds: 1\nsteps: 2\n"
SWEEPS = {
    "task: [digits-vit]\noptimizers: [adamw]\n": "task: ['digits-vit'] is not the name",
    "task: 3\noptimizers: [adamw]\n": "task: 3 is not the name",
    "task:\noptimizers: [adamw]\n": "task: None is not the name",
    "task: digits-vit\noptimizers: []\n": "optimizers: [] is neither",
    "task: digits-vit\noptimizers:\n": "optimizers: None is neither",
    "task: digits-vit\noptimizers: [[adamw]]\n": "optimizers: [['adamw']] is neither",
    "task: digits-vit\noptimizers: {adamw: 1}\n": "is neither the name",
    GOOD + "grid: 3\n": "grid: 3 is not a mapping",
    GOOD + "grid:\n": "grid: None is not a mapping",
    GOOD + "grid: {sgd_sai: {1: 2}}\n": "is not a mapping of hyperparameters",
    GOOD + "grid: {sgd_sai: {lr: []}}\n": "lr of sgd_sai is an empty list",
    GOOD + "grid: {sgd_sai: {lr: 1e999}}\n": "lr of sgd_sai: inf is not a positive number",
    GOOD + "grid: {sgd_sai: {lr: .nan}}\n": "lr of sgd_sai: nan is not a positive number",
    GOOD + "grid: {sgd_sai: {momentum: 1e999}}\n": "sgd_sai.momentum: inf is not a finite number",
    GOOD + "grid: {sgd_sai: {momentum: 2020-01-01}}\n": "sgd_sai.momentum",
    GOOD + "grid: {sgd_sai: {nesterov: perhaps}}\n": "sgd_sai.nesterov",
    GOOD.replace("seeds: 1", "seeds: 100000000000000000000"): "at most 100,000",
    GOOD.replace("seeds: 1", "seeds: [3]"): "seeds is the number of seeds",
    GOOD.replace("steps: 2", "epochs: 1.0e+308"): "at most 1,000,000,000 steps",
    GOOD.replace("steps: 2", "epochs: .inf"): "epochs: inf is not a positive number",
    GOOD.replace("steps: 2", "steps: []"): "steps is an empty list",
    GOOD.replace("steps: 2", "steps: 0"): "steps: 0 is not a positive",
    GOOD + "batch_size: 100000000000000000000\n": "at most 1,000,000,000 steps of 1,048,576",
    GOOD + "lr_rule: [sqrt]\n": "unknown lr_rule",
    GOOD + "best_of: it.yaml\n": "best_of leads back",
    "task: 2020-13-45\noptimizers: adamw\n": "is not YAML",
    "[" * 3000: "is not YAML",
    "": "is no sweep",
}


@pytest.mark.parametrize("text", SWEEPS)
def test_a_sweep_that_makes_no_sense_is_refused(tmp_path, text):
    file = tmp_path / "it.yaml"
    file.write_text(text)
    refused(cli("sweep", file, "--out", tmp_path / "runs", "--device", "cpu"), SWEEPS[text])
    assert not list(tmp_path.glob("runs/*/*.json"))


def test_a_sweep_in_another_encoding_is_refused(tmp_path):
    file = tmp_path / "it.yaml"
    file.write_bytes("task: größe\n".encode("latin-1"))
    refused(cli("sweep", file, "--out", tmp_path / "runs"), "is not UTF-8 text")
    refused(cli("sweep", tmp_path, "--out", tmp_path / "runs"), "is a folder")


def test_no_optimizer_is_no_comparison():
    with pytest.raises(UsageError, match="0 runs"):
        plan_runs(TASK, DATA, [])
    with pytest.raises(UsageError, match="neither the name"):
        Sweep("digits-vit", [])
    with pytest.raises(UsageError, match=f"{MAX_RUNS:,}"):
        plan_runs(TASK, DATA, ["adamw"], seeds=10**20)


# --- hyperparameters as text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer, name, text, value", [
    ("sgd_sai", "lr", "0.01", 0.01),
    ("adamw", "lr", "1e-2", 0.01),
    ("sgd_sai", "nesterov", "true", True),
    ("adamw", "amsgrad", "true", True),
    ("adamw", "fused", "none", None),
    ("sgd_sai", "state_dtype", "torch.bfloat16", "bfloat16"),
    ("sgd_sai", "state_dtype", torch.int8, "int8"),
    ("sgd_sai", "scale", "sqrt_numel", "sqrt_numel"),
    ("sgd_sai", "scale", "none", "none"),
    ("adamw", "betas", "(0.9, 0.99)", (0.9, 0.99)),
    ("adamw", "betas", [0.9, 0.99], (0.9, 0.99)),
    ("adahessian", "block_size", "32", 32),
    ("po:Lion", "weight_decouple", "false", False),
    ("po:Lion", "something", "2.5", 2.5),
])  # fmt: skip
def test_text_is_the_same_run_as_the_value(optimizer, name, text, value):
    assert parse_hyperparameters(optimizer, {name: text}) == {name: value}
    one, other = (spec_with(TASK, DATA, optimizer, {name: given}) for given in (text, value))
    assert one.key == other.key and json.loads(to_json(one.hyperparameters))


def test_a_comparison_with_text_finds_its_runs(tmp_path):
    for value in ("0.01", "1e-2", ".01"):
        done = cli("compare", "-o", "sgdm", "--seeds", 1, "--steps", 2, "--device", "cpu", "--out", tmp_path, "--set",
                   f"sgdm.lr={value}")  # fmt: skip
        assert done.exit_code == 0, done.output
    (run,) = load_runs(tmp_path)
    assert run["hyperparameters"]["lr"] == 0.01


def test_values_of_yaml_are_the_same_run(tmp_path):
    file, keys = tmp_path / "it.yaml", set()
    for value in ("1e-2", "'0.01'", "0.01"):
        file.write_text(
            GOOD + f"grid: {{sgd_sai: {{lr: {value}, nesterov: {'true' if 'e' in value else repr('yes')}}}}}\n"
        )
        keys |= {spec.key for spec in expand(read_sweep(file), DATA)}
    assert len(keys) == 1


def test_optimizers_are_built_with_text():
    model = torch.nn.Linear(3, 2)
    opt = build_optimizer("adamw", model, {"lr": "0.01", "amsgrad": "true", "betas": "0.8, 0.9"})
    assert (opt.defaults["lr"], opt.defaults["amsgrad"], opt.defaults["betas"]) == (0.01, True, (0.8, 0.9))
    assert build_optimizer("sgd_sai", model, {"state_dtype": "bfloat16"}).defaults["state_dtype"] is torch.bfloat16


SETTINGS = """
    sgd_sai.lr=1e999 sgd_sai.lr=nan sgd_sai.lr=fast adamw.amsgrad=perhaps adamw.betas=0.9 adamw.betas=(0.9,x)
    sgd_sai.nesterov=2 sgd_sai.state_dtype=float61 sgdm.momentum=[1,2]
""".split()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_is_not_possible_is_named(setting, tmp_path):
    done = cli("compare", "-o", setting.split(".")[0], "--set", setting, "--steps", 1, "--out", tmp_path)
    refused(done, setting.split("=")[0])


@pytest.mark.parametrize("name", ["seed", "steps", "batch_size", "task", "optimizer", "precision", "data", "changes"])
def test_a_setting_never_changes_the_run_itself(name, tmp_path):
    "A hyperparameter that has the name of another argument is one that the optimizer does not have."
    done = cli("compare", "-o", "sgdm", "--set", f"sgdm.{name}=3", "--steps", 1, "--out", tmp_path)
    refused(done, f"unknown hyperparameter of sgdm '{name}'")


def test_a_hyperparameter_that_is_called_seed_is_one():
    spec = spec_with(TASK, DATA, "adahessian", {"seed": "7"}, seed=2)
    assert spec.seed == 2 and spec.hyperparameters["seed"] == 7
    check_spec(spec)


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def commands_with_a_device(folder):
    (folder / "it.yaml").write_text(GOOD)
    return {
        "compare": ["compare", "--steps", 1, "--out", folder / "runs"],
        "sweep": ["sweep", folder / "it.yaml", "--out", folder / "runs"],
        "repeat": ["repeat", save_run(folder, SPEC, outcome())],
        "cost": ["cost", "--rounds", 3],
        "gsnr": ["gsnr", "--out", folder / "runs"],
        "memory": ["memory", "vit_s16"],
        "speed": ["speed", "3x40"],
    }


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "gpu", "CPU", ""])
@pytest.mark.parametrize("command", ["compare", "sweep", "repeat", "cost", "gsnr", "memory", "speed"])
def test_a_device_that_is_not_there_is_an_error_in_every_command(no_gpu, tmp_path, command, device):
    arguments = commands_with_a_device(tmp_path)
    assert set(arguments) == {n for n, f in COMMANDS.items() if "device" in f.__annotations__}
    refused(cli(*arguments[command], "--device", device), "no CUDA device" if device == "cuda" else "unknown device")
    assert not (tmp_path / "runs").exists() or not list(tmp_path.glob("runs/*/*.json"))


def functions_with_a_device(folder):
    from sgd_sai.analysis.gsnr_records import gsnr_record
    from sgd_sai.benchmarks.small_tensors import measure_busy, measure_series
    from sgd_sai.benchmarks.step_memory import step_memory
    from sgd_sai.benchmarks.step_time import measure_speed
    from sgd_sai.benchmarks.training_step import step_costs
    from sgd_sai.experiments.compare import compare
    from sgd_sai.experiments.repeat import repeat_run
    from sgd_sai.experiments.sweep import run_sweep

    return [
        lambda device: train(TASK, DATA, SPEC, device=device),
        lambda device: compare(TASK, folder, ["adamw"], steps=1, device=device),
        lambda device: run_sweep(Sweep("digits-vit", ["adamw"], steps=1), folder, device=device),
        lambda device: repeat_run(save_run(folder, SPEC, outcome()), device=device),
        lambda device: gsnr_record(TASK, DATA, device=device),
        lambda device: step_costs(TASK, DATA, ["adamw"], device=device),
        lambda device: measure_speed([(3,)], device=device),
        lambda device: measure_series(device=device),
        lambda device: measure_busy([(3,)], device=device),
        lambda device: step_memory(device=device),
        lambda device: make_accelerator("no", device),
        check_device,
    ]


@pytest.mark.parametrize("number", range(12))
def test_a_device_that_is_not_there_is_an_error_in_python(no_gpu, tmp_path, number):
    function = functions_with_a_device(tmp_path)[number]
    for device, said in {"cuda": "no CUDA device", "cuda:7": "unknown device", "mps": "unknown device"}.items():
        with pytest.raises(UsageError, match=said):
            function(device)
    with pytest.raises(UsageError, match="unknown device"):
        function(torch.device("cpu"))


def test_a_device_that_accelerate_is_configured_against_is_an_error(monkeypatch):
    "It reads variables and files of its own, and would train on the CPU."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code = (
        "import torch\ntorch.cuda.is_available = lambda: True\n"
        "from sgd_sai.experiments.precision import make_accelerator\nmake_accelerator('no', 'cuda')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UsageError: the device 'cuda' was chosen, but accelerate is configured for 'cpu'" in done.stderr, (
        done.stderr
    )


def test_a_first_step_is_not_computed_elsewhere_than_was_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(cli("gsnr", "--device", "cuda"), "stay on the CPU")


def test_an_unknown_precision_is_an_error_in_python():
    with pytest.raises(UsageError, match="unknown precision 'fp8'"):
        plan_runs(TASK, DATA, ["adamw"], seeds=1, precision="fp8")


# --- everything else that was tried -----------------------------------------------------------------------------------

TRIED = [
    (["compare", "-o", ","], "names no optimizer"),
    (["compare", "--seeds", 10**20], "at most 100,000"),
    (["compare", "--steps", 10**20], "less than or equal to"),
    (["compare", "--workers", 10**20], "less than or equal to"),
    (["cost", "-o", ","], "names no optimizer"),
    (["cost", "-o", ""], "name at least one optimizer"),
    (["cost", "--rounds", 10**20], "less than or equal to"),
    (["memory", "-o", ","], "names no optimizer"),
    (["speed", "tensors", "--chunks"], "--chunks goes with a model"),
    (["speed", "3x40", "--chunks", "--busy"], "--chunks goes with a model"),
    (["speed", "3x40", "--chunks", "-o", "sgd_sai"], "--chunks goes with a model"),
    (["speed", "3x40", "-o", ","], "names no optimizer"),
    (["speed", "²x5"], "unknown model"),
    (["speed", "99999999999999999999x4"], "more than fits"),
    (["speed", "999999x9999999"], "more than fits"),
    (["speed", "3x40", "--threads", 10**20], "less than or equal to"),
    (["speed", "3x40", "--reference", "lbfgs"], "lbfgs cannot be the reference"),
    (["gsnr", "--seed", 10**20], "less than or equal to"),
    (["gsnr", "--plot", "figure.txt"], "ends with .png, .pdf or .svg"),
    (["gsnr", "--batches", 10**20, "--out", "x"], "less than or equal to"),
    (["repeat", "."], "is a folder"),
    (["repeat", ""], "is a folder"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, said", TRIED, ids=[" ".join(map(str, a)) for a, _ in TRIED])
def test_what_makes_no_sense_is_one_line(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(cli(*arguments), said)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("arguments", [["repeat", "none.json"], ["sweep", "none.yaml"], ["repeat", "none.jsonl#0123"]])
def test_files_that_are_not_there_are_said_without_a_number(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(cli(*arguments, "--device", "cpu"), f"{arguments[1].partition('#')[0]}: No such file or directory", 1)


def test_an_empty_environment_variable_is_none(monkeypatch):
    "What a shell leaves behind is no setting."
    monkeypatch.setenv("SGD_SAI_PLUGINS", os.pathsep)
    assert cli("tasks").exit_code == 0


@pytest.mark.parametrize("name", ["muon_sai", "muon_sai:sign", "muon_adamw"])
def test_good_settings_of_muon_are_checked_without_a_warning(name):
    spec = make_spec(TASK, DATA, name, lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_spec(spec)
