"""Plugins: a file of the user's own adds a task, an optimizer and a scale rule.

Each is used in fresh processes, from Python and from the command line, with workers that load the file for themselves.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from sgd_sai.experiments import plugins
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.plugins import PLUGINS_VARIABLE, load_plugins, plugin_environment
from sgd_sai.experiments.runs import load_runs
from sgd_sai.experiments.tasks.registry import TASKS, get_task, register_task

PLUGIN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sgd_sai import SGDSaI
from sgd_sai.experiments.optimizers import OptimizerEntry, register_optimizer
from sgd_sai.experiments.tasks.registry import register_task
from sgd_sai.experiments.tasks.task import Data, Task, digest
from sgd_sai.scale_rules import register_scale_rule


class MyOptimizer(torch.optim.SGD):
    pass


def load(folder=None):
    x = torch.linspace(-1, 1, 64)[:, None]
    return Data(TensorDataset(x, x.square()), TensorDataset(x, x.square()), {}, digest(x))


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1]), None


register_scale_rule("my_rule", lambda grad, param: 3.0)
register_optimizer(OptimizerEntry("my_optimizer", MyOptimizer))
register_optimizer(OptimizerEntry("my_sai", SGDSaI, settings={"scale": "my_rule"}))
register_task(
    Task(
        name="my-task", title="a parabola", source="computed", licence="none", minutes=0.01,
        load=load, build=lambda sizes: nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), loss=loss,
        metric="val_loss", steps=6, batch_size=16, warmup=1, eval_every=3, clip=None,
        settings={name: dict(lr=0.01) for name in ("my_optimizer", "my_sai", "sgd_sai")},
    )
)
"""
NAMES = {"my_optimizer", "my_sai", "sgd_sai"}


@pytest.fixture
def my_file(tmp_path):
    path = tmp_path / "my_file.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture
def clean(monkeypatch):
    "This process without plugins, before and after."
    monkeypatch.setattr(plugins, "PLUGIN_MODULES", {})
    monkeypatch.setenv(PLUGINS_VARIABLE, "")  # what load_plugins writes is undone
    known = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(known)


def fresh_process(*command, folder, **environment):
    "A process that knows of no plugin but those it is told of."
    env = {name: value for name, value in os.environ.items() if name != PLUGINS_VARIABLE}
    env |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200", **environment}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


def assert_all_trained(done, folder):
    assert done.returncode == 0, done.stdout + done.stderr
    runs = load_runs(folder / "runs", "my-task")
    assert {run["optimizer"] for run in runs} == NAMES and {run["status"] for run in runs} == {"finished"}
    assert len(runs) == 2 * len(NAMES)


# --- in fresh processes ---------------------------------------------------------------------------------------------


def test_python_trains_a_plugin_with_two_workers(my_file, tmp_path):
    code = """
from sgd_sai.experiments.compare import compare
from sgd_sai.experiments.plugins import load_plugins
from sgd_sai.experiments.tasks.registry import get_task

if __name__ == "__main__":
    load_plugins(["my_file.py"])
    names = ["my_optimizer", "my_sai", "sgd_sai"]
    compare(get_task("my-task"), "runs", optimizers=names, seeds=2, workers=2, device="cpu")
"""
    (tmp_path / "script.py").write_text(code)
    assert_all_trained(fresh_process("script.py", folder=tmp_path), tmp_path)


def test_command_line_trains_a_plugin_with_two_workers(my_file, tmp_path):
    command = "-m sgd_sai compare my-task --plugin my_file.py -o my_optimizer,my_sai,sgd_sai --seeds 2 --workers 2"
    assert_all_trained(fresh_process(*command.split(), "--device", "cpu", folder=tmp_path), tmp_path)


def test_workers_know_a_scale_rule_though_task_and_optimizer_are_built_in(my_file, tmp_path):
    command = "-m sgd_sai compare digits-vit --plugin my_file.py -o sgd_sai --set sgd_sai.scale=my_rule --steps 2"
    done = fresh_process(*command.split(), *"--seeds 2 --workers 2 --device cpu".split(), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = load_runs(tmp_path / "runs", "digits-vit")
    assert [run["hyperparameters"]["scale"] for run in runs] == ["my_rule"] * 2


def test_command_line_reads_the_environment(my_file, tmp_path):
    command = "-m sgd_sai compare my-task -o my_optimizer --seeds 1 --device cpu".split()
    assert fresh_process(*command, folder=tmp_path).returncode == 2
    done = fresh_process(*command, folder=tmp_path, **{PLUGINS_VARIABLE: str(my_file)})
    assert done.returncode == 0, done.stdout + done.stderr


def test_command_line_names_the_file_and_the_line_of_an_error(tmp_path):
    (tmp_path / "broken.py").write_text("a = 1\n\nb = a.c\n")
    done = fresh_process("-m", "sgd_sai", "compare", "--plugin", "broken.py", folder=tmp_path)
    message = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == 2 and "Traceback" not in message
    assert f"{tmp_path.resolve() / 'broken.py'}, line 3: AttributeError" in message


def test_entry_point_of_an_installed_package_is_loaded(tmp_path):
    (tmp_path / "my_package.py").write_text("print('loaded')\n")
    (tmp_path / "my_package-1.dist-info").mkdir()
    (tmp_path / "my_package-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my_package\nVersion: 1\n"
    )
    (tmp_path / "my_package-1.dist-info" / "entry_points.txt").write_text("[sgd_sai.plugins]\nmine = my_package\n")
    code = "from sgd_sai.experiments.plugins import load_plugins; load_plugins(); load_plugins()"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert fresh_process("-c", code, folder=tmp_path, PYTHONPATH=path).stdout == "loaded\n"
    (tmp_path / "my_package.py").write_text("1 / 0\n")
    done = fresh_process("-c", code, folder=tmp_path, PYTHONPATH=path)
    assert "UsageError: plugin mine (my_package, an entry point" in done.stderr and "ZeroDivisionError" in done.stderr


# --- in this process ------------------------------------------------------------------------------------------------


def test_a_file_is_imported_once_and_handed_on(clean, tmp_path, capfd, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f"print('{name}')\n")
    monkeypatch.chdir(tmp_path)
    (first,) = load_plugins("a.py")
    assert load_plugins([tmp_path / "a.py", "b.py"])[0] is first
    load_plugins()
    assert capfd.readouterr().out == "a\nb\n"
    both = os.pathsep.join(str(tmp_path.resolve() / name) for name in ("a.py", "b.py"))
    assert plugin_environment() == {PLUGINS_VARIABLE: both}


def test_no_plugins_need_no_environment(clean):
    assert load_plugins() == [] and plugin_environment() == {}


def test_missing_and_broken_files_are_named_and_not_handed_on(clean, tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("x = (\n")
    with pytest.raises(UsageError, match=r"nowhere\.py"):
        load_plugins([tmp_path / "nowhere.py"])
    with pytest.raises(UsageError, match=r"bad\.py, line 1: SyntaxError"):
        load_plugins([tmp_path / "bad.py"])
    assert plugin_environment() == {}
    (tmp_path / "bad.py").write_text("x = 1\n")
    assert load_plugins([tmp_path / "bad.py"])[0].x == 1  # once it is corrected
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path / "gone.py"))
    with pytest.raises(UsageError, match=r"gone\.py \(from \$SGD_SAI_PLUGINS\)"):
        load_plugins()


def test_a_task_is_looked_for_in_plugins_before_it_is_unknown(clean, tmp_path, monkeypatch):
    (tmp_path / "more.py").write_text(
        "from dataclasses import replace\n"
        "from sgd_sai.experiments.tasks.registry import get_task, register_task\n"
        "register_task(replace(get_task('digits-vit'), name='digits-again'))\n"
    )
    with pytest.raises(UsageError, match="unknown task"):
        get_task("digits-again")
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path / "more.py"))
    assert get_task("digits-again").steps == get_task("digits-vit").steps


def test_names_of_tasks(clean):
    task = get_task("digits-vit")
    assert register_task(task) is task  # as it is
    with pytest.raises(UsageError, match="built-in task"):
        register_task(replace(task, steps=1))
    for name in ("", "a/b", "..", "a b"):
        with pytest.raises(UsageError, match="cannot be the name"):
            register_task(replace(task, name=name))
    register_task(replace(task, name="mine"))
    assert register_task(replace(task, name="mine", steps=7)) is get_task("mine")
