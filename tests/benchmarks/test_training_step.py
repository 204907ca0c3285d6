"The cost of whole training steps: the optimizer's share, steps within steps, and the model that is only timed."

import torch
from typer.testing import CliRunner

from sgd_sai.benchmarks.training_step import own_times, step_cost_task, step_costs
from sgd_sai.cli.app import app
from sgd_sai.experiments.muon_adamw import MuonAdamW


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_share_of_the_optimizer_is_part_of_the_step():
    task = step_cost_task("digits-vit")
    cost = step_costs(task, task.load(), ["sgdm", "adan"], rounds=3, device="cpu")["optimizers"]
    assert all(0 < c["optimizer_ms"]["median"] < c["ms"]["median"] for c in cost.values())


def test_a_step_within_a_step_is_counted_once():
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    opt = MuonAdamW(model)  # whose step calls that of AdamW
    seconds = own_times(opt, "cpu")
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        opt.step()
    assert len(seconds) == 3 and min(seconds) > 0


def test_gpt2_small_is_timed_and_no_task():
    task = step_cost_task("gpt2-small")
    data = task.load()
    x, y = data.train[0]
    assert len(x) == 128 and torch.equal(x[1:], y[:-1]) and data.sizes["vocab_size"] == 50257
    done = cli("cost", "gpt2-smal")
    assert done.exit_code == 2 and "did you mean gpt2-small" in " ".join(done.output.replace("│", " ").split())
    assert "gpt2-small" not in cli("tasks").output
