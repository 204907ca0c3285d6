"What single commands decide for themselves: how many processes, whose turn it is, what is found and what is the same."

import json

import pytest
import torch
from run_files import outcome
from typer.testing import CliRunner

from sgd_sai.benchmarks import training_step
from sgd_sai.benchmarks.training_step import own_times, step_costs
from sgd_sai.cli import gsnr_commands, train_commands
from sgd_sai.cli.app import app
from sgd_sai.experiments import plugins
from sgd_sai.experiments.handing_over import things_to_send
from sgd_sai.experiments.optimizers import OPTIMIZERS
from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.runs import save_run
from sgd_sai.experiments.tasks.registry import get_task

TASK = get_task("digits-vit")


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("device, gpu, cores, workers", [
    (None, False, 8, 2), (None, False, 1, 1), (None, True, 8, 1), ("cpu", True, 8, 2), ("cuda", True, 8, 1),
])  # fmt: skip
def test_a_gpu_trains_one_run_at_a_time_and_a_processor_two(device, gpu, cores, workers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(train_commands.os, "cpu_count", lambda: cores)
    assert train_commands._default_workers(device) == workers


def test_a_run_that_ends_otherwise_is_not_the_same(tmp_path, monkeypatch):
    "With the same numbers: it diverged then, and does not now."
    path = save_run(tmp_path, make_spec(TASK, TASK.load(), "sgdm", steps=2), outcome(status="diverged"))
    old = json.loads(path.read_text())
    monkeypatch.setattr("sgd_sai.experiments.repeat.train", lambda *_, **__: {**old, "status": "finished"})
    done = cli("repeat", path, "--device", "cpu")
    assert done.exit_code == 1 and "not the same (diverged, now finished)" in " ".join(done.output.split())


def test_fresh_makes_a_record_that_is_there_again(tmp_path):
    made, spec = [], {"format": 1, "model": "a-model", "seed": 0}

    def make(update):
        made.append(0)
        return spec | {"number": len(made)}

    for fresh, number in ((False, 1), (False, 1), (True, 2), (False, 2)):
        assert gsnr_commands._find_or_make_record(spec, make, tmp_path, fresh)["number"] == number


def test_a_record_of_no_measurement_is_refused(tmp_path):
    done = cli("memory", "vit_s16", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "add --measure" in done.output and not (tmp_path / "out").exists()


def test_a_step_that_calls_another_one_of_the_same_optimizer_is_counted_once():
    params = [torch.nn.Parameter(torch.ones(2))]
    torch.optim.SGD(params, lr=0.1)  # from now on its step calls the hooks, too

    class Nested(torch.optim.SGD):
        def step(self, closure=None):
            super().step()

    opt, params[0].grad = Nested(params, lr=0.1), torch.ones(2)
    seconds = own_times(opt, "cpu")
    opt.step()
    opt.step()
    assert len(seconds) == 2


def test_nobody_is_always_first(monkeypatch):
    order, step = [], training_step._Trainers.step

    def noted(self, name, batch):
        order.append(name)
        step(self, name, batch)

    monkeypatch.setattr(training_step._Trainers, "step", noted)
    step_costs(TASK, TASK.load(), ["sgdm", "adamw", "sgd_sai"], rounds=3, device="cpu")
    assert [order[3 + 3 * i] for i in range(3)] == ["sgdm", "adamw", "sgd_sai"]


def test_what_a_plugin_has_registered_is_not_sent(tmp_path, monkeypatch):
    "A worker loads the plugin; functions of it, which may be lambdas, cannot always be pickled."
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from sgd_sai.experiments.optimizer_entry import OptimizerEntry\n"
        "from sgd_sai.experiments.optimizers import register_optimizer\n"
        "register_optimizer(OptimizerEntry('by_plugin', lambda params, lr=0.1: torch.optim.SGD(params, lr)))\n"
    )
    monkeypatch.setattr(plugins, "PLUGIN_MODULES", {})
    monkeypatch.setenv(plugins.PLUGINS_VARIABLE, "")
    try:
        plugins.load_plugins([tmp_path / "mine.py"])
        assert things_to_send(TASK, [make_spec(TASK, TASK.load(), "by_plugin")]) == []
    finally:
        OPTIMIZERS.pop("by_plugin", None)
