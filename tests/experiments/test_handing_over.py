"Workers train what this process means: tasks, optimizers and scale rules reach them, or it is said."

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from sgd_sai.experiments.attempts import Job, attempt, train_run
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.handing_over import register_things, things_to_send
from sgd_sai.experiments.optimizer_entry import OptimizerEntry
from sgd_sai.experiments.optimizers import OPTIMIZERS, register_optimizer
from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.runs import load_runs
from sgd_sai.experiments.tasks.registry import TASKS, get_task, register_task
from sgd_sai.experiments.tasks.task import Data
from sgd_sai.scale_rules import SCALE_RULES, register_scale_rule

SCRIPT = """
import sys
import torch
from dataclasses import replace
from torch import nn
from torch.utils.data import TensorDataset
from sgd_sai.experiments.compare import compare
from sgd_sai.experiments.optimizers import OptimizerEntry, register_optimizer
from sgd_sai.experiments.tasks.registry import get_task, register_task
from sgd_sai.experiments.tasks.task import Data, Task, digest
from sgd_sai.scale_rules import register_scale_rule


def load(folder=None):
    x = torch.linspace(-1, 1, 64)[:, None]
    return Data(TensorDataset(x, x.square()), TensorDataset(x, x.square()), {}, digest(x))


def build(sizes):
    return nn.Linear(1, 1)


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1]), None


def times_ten(model, batch):
    value, right = digits.loss(model, batch)
    return 10 * value, right


class Mine(torch.optim.SGD):
    pass


def rule(grad, param):
    return 3.0


digits = get_task("digits-vit")
parabola = Task(name="parabola", title="", source="", licence="", minutes=0.01, load=load, build=build, loss=loss,
    metric="val_loss", steps=6, batch_size=16, warmup=1, eval_every=3, clip=None, settings={})


def go(task, *names, **changes):
    compare(task, "runs", optimizers=names, seeds=2, steps=4, workers=2, device="cpu",
        changes={name: {"lr": 0.01, **changes} for name in names})

"""
MAIN = "\nif __name__ == '__main__':\n"


def script(folder, text, *command):
    (folder / "script.py").write_text(SCRIPT + text)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command or [sys.executable, "script.py"], cwd=folder, env=env, capture_output=True, text=True)


def trained(done, folder, task):
    assert done.returncode == 0, done.stderr[-2000:]
    runs = load_runs(folder / "runs", task)
    assert [run["status"] for run in runs] == ["finished"] * len(runs)
    return runs


# --- in fresh processes ---------------------------------------------------------------------------------------------


def test_a_task_and_an_optimizer_of_a_script_reach_the_workers(tmp_path):
    main = MAIN + "    register_optimizer(OptimizerEntry('mine', Mine))\n    go(parabola, 'mine', 'sgd_sai')\n"
    runs = trained(script(tmp_path, main), tmp_path, "parabola")
    assert sorted(run["optimizer"] for run in runs) == ["mine", "mine", "sgd_sai", "sgd_sai"]


def test_a_scale_rule_of_a_script_reaches_the_workers(tmp_path):
    main = MAIN + "    register_scale_rule('my_rule', rule)\n    go(parabola, 'sgd_sai', scale='my_rule')\n"
    runs = trained(script(tmp_path, main), tmp_path, "parabola")
    assert [run["hyperparameters"]["scale"] for run in runs] == ["my_rule"] * 2


def test_a_changed_built_in_task_is_trained_as_it_was_changed(tmp_path):
    "Looked up by its name in the worker, it would be the one that was not changed, without a word."
    main = MAIN + "    go(replace(digits, loss=times_ten), 'sgd_sai')\n"
    runs = trained(script(tmp_path, main), tmp_path, "digits-vit")
    assert [run["history"][0]["val_loss"] > 15 for run in runs] == [True, True]


def test_what_a_script_registers_when_it_is_imported_need_not_be_sent(tmp_path):
    "A lambda cannot be, but the worker imports the script too."
    top = "register_task(replace(parabola, build=lambda sizes: nn.Linear(1, 1)))\n"
    main = MAIN + "    go(get_task('parabola'), 'sgd_sai')\n"
    assert len(trained(script(tmp_path, top + main), tmp_path, "parabola")) == 2


@pytest.mark.parametrize("main", [
    "    go(replace(parabola, build=lambda sizes: nn.Linear(1, 1)), 'sgd_sai')\n",
    "    go(replace(digits, build=lambda sizes: nn.Linear(1, 1)), 'sgd_sai')\n",
])  # fmt: skip
def test_a_task_that_cannot_be_sent_is_said(tmp_path, main):
    done = script(tmp_path, MAIN + main)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "UsageError: the task" in last and "define it in a plugin file" in last, done.stderr
    assert not load_runs(tmp_path / "runs")


def test_a_task_of_a_session_without_a_file_is_said(tmp_path):
    "As in a notebook: the worker has no module to find the functions in."
    code = SCRIPT + "\ngo(parabola, 'sgd_sai')\n"
    done = script(tmp_path, "", sys.executable, "-c", code)
    last = done.stderr.strip().splitlines()[-1]
    assert "UsageError: the task 'parabola' exists in this process alone" in last, done.stderr[-2000:]


def test_ray_gets_what_is_defined_here(tmp_path):
    pytest.importorskip("ray")
    main = MAIN + (
        "    from sgd_sai.experiments.sweep import Sweep, run_sweep\n"
        "    register_task(replace(parabola, build=lambda sizes: nn.Linear(1, 1)))\n"
        "    register_optimizer(OptimizerEntry('mine', Mine))\n"
        "    sweep = Sweep('parabola', ['mine'], seeds=2, steps=3, grid={'mine': {'lr': 0.01}})\n"
        "    made = run_sweep(sweep, 'runs', device='cpu', engine='ray')\n"
        "    assert made['trained'] == 2, made['failures']\n"
    )
    assert len(trained(script(tmp_path, main), tmp_path, "parabola")) == 2


# --- in this process ------------------------------------------------------------------------------------------------


@pytest.fixture
def tables():
    "The registries, which are as before after the test."
    kept = [(table, dict(table)) for table in (TASKS, OPTIMIZERS, SCALE_RULES)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def double(grad, param):
    return 2.0


class MySGD(OPTIMIZERS["sgdm"].cls):
    pass


def specs_of(task, *names, **changes):
    data = Data(range(1438), range(10), {}, "0" * 12)
    return [make_spec(task, data, name, **changes) for name in names]


def test_package_and_plugins_are_not_sent(tables):
    task = get_task("digits-vit")
    specs = specs_of(task, "sgd_sai", "adamw", "po:Lion", "scaled:rows", "po:AdamMini", scale="sqrt_numel")
    assert things_to_send(task, specs) == []


def test_what_is_sent_is_registered_there(tables):
    task = register_task(replace(get_task("digits-vit"), name="mine"))
    register_optimizer(OptimizerEntry("my_sgd", MySGD))
    register_optimizer(OptimizerEntry("my_sai", OPTIMIZERS["sgd_sai"].cls, settings={"scale": "my_rule"}))
    register_scale_rule("my_rule", double)
    register_scale_rule("unused", double)
    things = things_to_send(task, specs_of(task, "my_sgd", "my_sai"))
    found = {(thing.kind, thing.name) for thing in things}
    assert found == {("task", "mine"), ("optimizer", "my_sgd"), ("optimizer", "my_sai"), ("scale rule", "my_rule")}
    del TASKS["mine"], OPTIMIZERS["my_sgd"], SCALE_RULES["my_rule"]
    register_things(pickle.loads(pickle.dumps(things)))
    assert TASKS["mine"].steps == task.steps and OPTIMIZERS["my_sgd"].cls is MySGD and SCALE_RULES["my_rule"] is double


def test_a_replaced_optimizer_is_sent(tables):
    task = get_task("digits-vit")
    register_optimizer(OptimizerEntry("adamw", MySGD), replace=True)
    (thing,) = things_to_send(task, specs_of(task, "adamw"))
    assert (thing.kind, thing.name, thing.mistakable) == ("optimizer", "adamw", True)


def test_runs_on_other_data_than_they_were_defined_with_are_refused(tmp_path):
    "A worker, or a machine of a cluster, has loaded the data for itself."
    task = get_task("digits-vit")
    data = task.load()
    spec, job = make_spec(task, data, "sgdm", steps=2), Job(task.name, tmp_path, device="cpu")
    other = data._replace(digest="f" * 12)
    with pytest.raises(UsageError, match="are others"):
        train_run(job, task, other, spec)
    outcome = attempt(job, task, other, spec)
    assert outcome.state == "failed" and "are others" in outcome.message and not load_runs(tmp_path)


def test_a_remote_run_checks_its_data_and_loads_plugins(tmp_path, monkeypatch, tables):
    "What Ray calls in its own processes."
    from sgd_sai.experiments import engines, plugins

    (tmp_path / "my_file.py").write_text(
        "from dataclasses import replace\n"
        "from sgd_sai.experiments.optimizer_entry import StepBenchmark\n"
        "from sgd_sai.experiments.optimizers import OPTIMIZERS, register_optimizer\n"
        "changes = dict(name='from_a_plugin', aliases=(), benchmark=StepBenchmark())\n"
        "register_optimizer(replace(OPTIMIZERS['adamw'], **changes))\n"
    )
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, str(tmp_path / "my_file.py"))
    monkeypatch.setattr(plugins, "PLUGIN_MODULES", {})
    monkeypatch.setattr("sgd_sai.experiments.optimizers.load_plugins", lambda: None)  # no second chance
    monkeypatch.setattr("sgd_sai.experiments.tasks.registry.load_plugins", lambda: None)
    task = get_task("digits-vit")
    data, job = task.load(), Job(task.name, tmp_path, device="cpu")
    spec = replace(make_spec(task, data, "adamw", steps=2), optimizer="from_a_plugin")
    assert engines._remote_run(job, spec, [])["status"] == "finished"
    with pytest.raises(UsageError, match="are others"):
        engines._remote_run(job, replace(spec, data="f" * 12), [])


def test_run_files_name_what_was_trained(tmp_path):
    "The digest of the data is that of the data that were loaded."
    task = get_task("digits-vit")
    data = task.load()
    spec = make_spec(task, data, "sgdm", steps=2)
    attempt(Job(task.name, tmp_path, device="cpu"), task, data, spec)
    (run,) = load_runs(tmp_path)
    assert run["data"] == data.digest and json.loads(next(tmp_path.glob("*/*.json")).read_text())["key"] == spec.key
