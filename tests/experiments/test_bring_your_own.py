"""The tutorial *Bring your own model, data and optimizer*: its files, read out of the notebook, by command line in an
empty folder. And what a newcomer gets wrong in such a file, which has to end in words that say what to change."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sgd_sai.analysis.own_rankings import at_best_settings, baseline_of, own_ranking
from sgd_sai.analysis.rankings import read_experiment
from sgd_sai.cli.app import app
from sgd_sai.experiments.attempts import Job, attempt
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.optimizers import OptimizerEntry, register_optimizer
from sgd_sai.experiments.plugins import PLUGIN_MODULES, PLUGINS_VARIABLE, load_plugins
from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.runs import load_runs
from sgd_sai.experiments.tasks.registry import get_task
from sgd_sai.experiments.tasks.task import Task

TUTORIAL = Path(__file__).parents[2] / "nbs/tutorials/bring_your_own.ipynb"
LABELS = {"Equal steps", "SGD-SaI", "Muon + SGD-SaI", "AdamW"}


def files_of_the_tutorial():
    "File name -> text, as the cells with %%writefile write it."
    files = {}
    for cell in json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"]:
        first, _, text = "".join(cell["source"]).partition("\n")
        if written := re.fullmatch(r"%%writefile (-a )?(\S+)", first):
            files[written[2]] = (files[written[2]] if written[1] else "") + text + "\n"
    return files


def commands_of_the_tutorial():
    "The lines of `sgd-sai` under *By command line* as lists of arguments, for one process, which is faster here."
    cells = json.loads(TUTORIAL.read_text(encoding="utf-8"))["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    block = re.search(r"## By command line\n.*?```sh\n(.*?)```", prose, re.DOTALL)[1]
    return [line.replace("--workers 2", "--device cpu").split()[1:] for line in block.splitlines()]


def sgd_sai(arguments, folder):
    env = {name: value for name, value in os.environ.items() if name != PLUGINS_VARIABLE}
    env |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "sgd_sai", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def written(tmp_path):
    "The tutorial's files in an empty folder, with a tenth of the steps."
    for name, text in files_of_the_tutorial().items():
        (tmp_path / name).write_text(text.replace("steps=200", "steps=20"))
    return tmp_path


def test_the_file_of_the_tutorial_is_short_and_has_nothing_from_the_notebook():
    files = files_of_the_tutorial()
    assert files.keys() == {"my_file.py", "tune.yaml", "final.yaml"}
    lines = [line for line in files["my_file.py"].splitlines() if line.strip()]
    assert len(lines) <= 46 and max(map(len, lines)) < 80


def test_the_commands_of_the_tutorial_rank_the_readers_optimizer_in_an_empty_folder(written):
    commands = commands_of_the_tutorial()
    assert [command[0] for command in commands] == ["sweep", "sweep", "rank"]
    for command in commands:
        done = sgd_sai(command, written)
        assert done.returncode == 0, done.stdout + done.stderr
    assert LABELS <= {label for label in LABELS if f"\n{label} " in done.stdout}
    assert "against AdamW" in done.stdout and re.search(r"\nEqual steps .*\] (better|worse|even|open)", done.stdout)
    assert (written / "runs/rank-my-task.png").stat().st_size > 1000
    runs = load_runs(written / "runs", "my-task")
    assert len(runs) == 12 + 12 and {run["status"] for run in runs} == {"finished"}


# --- the ranking ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clean(monkeypatch):
    "What plugins leave behind is removed."
    from sgd_sai.experiments.plugins import registries

    kept = [(table, dict(table)) for table in (*registries().values(), PLUGIN_MODULES)]
    monkeypatch.delenv(PLUGINS_VARIABLE, raising=False)
    yield
    for table, before in kept:
        table.clear()
        table.update(before)
    os.environ.pop(PLUGINS_VARIABLE, None)


def in_this_process(line):
    "What `sgd-sai LINE` prints, in one line, and its exit code."
    done = CliRunner().invoke(app, line.split(), env={"COLUMNS": "200"})
    return " ".join(done.output.replace("│", " ").split()), done.exit_code


def test_a_grid_is_ranked_at_its_best_settings_and_says_so(clean, written, monkeypatch):
    monkeypatch.chdir(written)
    text = "task: my-task\noptimizers: [adamw, my_optimizer]\nseeds: 2\nsteps: 3\n"
    (written / "grid.yaml").write_text(text + "grid: {adamw: {lr: [0.01, 1.0e-6]}, my_optimizer: {lr: 0.003}}\n")
    arguments = "grid.yaml --plugin my_file.py --out runs"
    said, code = in_this_process(f"rank {arguments}")
    assert code == 1 and "6 of 6 runs" in said and "train them with: sgd-sai sweep" in said
    assert in_this_process(f"sweep {arguments} --device cpu")[1] == 0
    grid = read_experiment("grid.yaml", "runs")
    best = at_best_settings(grid)
    assert len(grid.runs) == 6 and len(best.runs) == 4 and best.stages == [grid.runs]
    assert baseline_of(best, None) == "adamw"
    table = own_ranking(best, "my_optimizer")
    assert table.loc["AdamW", "cells"] == 2 and table.loc["Equal steps", "against Equal steps"] == ""
    said, code = in_this_process(f"rank {arguments} --against my_optimiser")
    assert code == 2 and "did you mean my_optimizer?" in said
    said, code = in_this_process(f"rank {arguments}")
    assert code == 0 and "against AdamW" in said and "chosen on these same runs" in said


def test_a_sweep_in_epochs_is_ranked_with_the_size_of_the_data(clean, written, monkeypatch):
    monkeypatch.chdir(written)
    (written / "epochs.yaml").write_text("task: my-task\noptimizers: adamw\nseeds: 1\nepochs: 0.2\n")
    (written / "again.yaml").write_text("task: my-task\noptimizers: adamw\nseeds: 2\nbest_of: epochs.yaml\n")
    for name in ("epochs", "again"):
        assert in_this_process(f"sweep {name}.yaml --plugin my_file.py --out runs --device cpu")[1] == 0
        said, code = in_this_process(f"rank {name}.yaml --plugin my_file.py --out runs")
        assert code == 0 and "figure" in said and " default " in said, said  # the class's own learning rate


# --- what is wrong in a file ----------------------------------------------------------------------------------------

SLIPS = {  # what stands in the file, what a newcomer writes, what is said
    "steps": ("steps=200", "steps='200'", r"line \d+: UsageError: steps of my-task: '200' is not a whole number"),
    "eval": ("eval_every=40", "eval_every=0", "eval_every of my-task: 0 is not a whole number"),
    "metric": ('metric="accuracy"', 'metric="loss"', "unknown metric of my-task 'loss', did you mean val_loss"),
    "settings": ('metric="acc', 'settings={"adamw": 0.1}, metric="acc', "settings of my-task, adamw: 0.1 is no dict"),
    "function": ("loss=loss", "loss=nn.MSELoss().reduction", "loss of my-task: 'mean' is not a function"),
    "space": ('Entry("my_optimizer"', 'Entry("my optimizer"', "'my optimizer' cannot be the name of an optimizer"),
    "object": (", EqualSteps, ", ", EqualSteps([torch.ones(1)]), ", "build is one EqualSteps; give the class itself"),
    "no folder": ("def load(folder=None)", "def load()", "load of my-task, called with the folder for data: TypeError"),
    "tuple": ("return Data(train, val, {", "return (train, val, {", "load of my-task returned a tuple: return Data"),
    "digest": ("digest(rows, labels))", "None)", "the digest is None"),
    "items": ("TensorDataset(rows[:1400], labels[:1400])", "rows[:1400]", "an item of train is a Tensor, not a tuple"),
    "line": ("images.float()", "image.float()", r"NameError: .*'image' is not defined.*my_file.py, line 13\)"),
}


@pytest.mark.parametrize("before, after, said", SLIPS.values(), ids=SLIPS)
def test_a_slip_in_the_file_is_said_before_anything_trains(clean, before, after, said, tmp_path):
    from sgd_sai.experiments.tasks.parts import load_data

    text = files_of_the_tutorial()["my_file.py"]
    assert text.count(before) == 1
    (tmp_path / "my_file.py").write_text(text.replace(before, after))
    with pytest.raises(UsageError, match=said):
        load_plugins([tmp_path / "my_file.py"])
        load_data(get_task("my-task"))


RUN_SLIPS = {
    "build": ("def __init__(self, sizes)", "def __init__(self)", "build of my-task, called with the sizes"),
    "no model": ("build=RowReader", "build=lambda sizes: print", "build of my-task returned a builtin_function"),
    "loss alone": ("entropy(logits, labels), correct", "entropy(logits, labels)", "loss of my-task returned a Tensor"),
    "no mean": (
        "logits, labels), correct",
        "logits, labels, reduction='none'), correct",
        r"the loss is of shape \(128",
    ),
    "detached": ("labels), correct", "labels).detach(), correct", "the loss has no gradient"),
    "share": (
        "labels).sum()",
        "labels).float().mean()",
        "not a number of hits",
    ),
    "none": ("labels), correct", "labels), None", "correct is None, but the metric is accuracy"),
    "line": ("m.lerp_(p.grad,", "m.lerp_(p.gard,", r"AttributeError: .*gard.* \(my_file.py, line 5\d\)"),
}


@pytest.mark.parametrize("before, after, said", RUN_SLIPS.values(), ids=RUN_SLIPS)
def test_a_slip_in_a_run_is_said_with_the_function_or_the_line(clean, before, after, said, tmp_path):
    text = files_of_the_tutorial()["my_file.py"]
    assert text.count(before) == 1
    (tmp_path / "my_file.py").write_text(text.replace(before, after))
    load_plugins([tmp_path / "my_file.py"])
    task = get_task("my-task")
    data = task.load()
    spec = make_spec(task, data, "my_optimizer", steps=2)
    outcome = attempt(Job("my-task", tmp_path / "runs", device="cpu"), task, data, spec)
    assert outcome.state == "failed" and re.search(said, outcome.message) and "UsageError" not in outcome.message


def test_a_count_may_be_a_number_of_python(clean, tmp_path):
    text = files_of_the_tutorial()["my_file.py"]
    records = []
    for name, count in (("a", "labels).sum()"), ("b", "labels).sum().item()")):
        path = tmp_path / f"{name}.py"
        path.write_text(text.replace("labels).sum()", count))
        if name == "b":
            path.write_text(path.read_text().replace("my-task", "b-task").replace("my_opt", "b_opt"))
        load_plugins([path])
        task = get_task("my-task" if name == "a" else "b-task")
        data = task.load()
        job = Job(task.name, tmp_path / "runs", device="cpu")
        assert attempt(job, task, data, make_spec(task, data, "adamw", steps=2)).state == "trained"
        records += load_runs(tmp_path / "runs", task.name)
    assert records[0]["final"] == records[1]["final"]


# --- what an optimizer of the reader may be -------------------------------------------------------------------------


def test_an_optimizer_may_take_the_model_and_differentiate_twice(clean, tmp_path):
    "As the table of the tutorial says."
    graphs = []

    class OnNames(torch.optim.SGD):
        def __init__(self, model, lr=0.1):
            self.names = [name for name, _ in model.named_parameters()]
            super().__init__(model.parameters(), lr=lr)

        def needs_graph(self):
            return True

        def step(self, closure=None):
            grads = [p.grad for p in self.param_groups[0]["params"]]
            graphs.append((closure, all(grad.requires_grad for grad in grads)))
            super().step()

    (tmp_path / "my_file.py").write_text(files_of_the_tutorial()["my_file.py"])
    load_plugins([tmp_path / "my_file.py"])
    register_optimizer(OptimizerEntry("on_names", OnNames, takes_model=True))
    task = replace(get_task("my-task"), clip=None)
    data = task.load()
    job = Job("my-task", tmp_path / "runs", device="cpu")
    assert attempt(job, task, data, make_spec(task, data, "on_names", steps=2)).state == "trained"
    assert graphs == [(None, True)] * 2


def test_a_task_of_eight_fields(clean):
    numbers = dict(steps=10, batch_size=2, eval_every=5)
    task = Task(name="short", load=len, build=len, loss=len, metric="val_loss", **numbers)
    assert (task.title, task.minutes, task.warmup, task.clip, task.settings) == ("short", None, 0, None, {})
