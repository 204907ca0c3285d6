"Memory of a training step in a process of its own: it agrees with the rule, failures say why, records are kept."

import json
import types

import pytest
from typer.testing import CliRunner

from sgd_sai.benchmarks import step_memory as measuring
from sgd_sai.benchmarks.step_memory import MODEL, step_memory, step_memory_path, step_memory_table
from sgd_sai.cli.app import app
from sgd_sai.experiments.errors import UsageError


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], terminal_width=100)


def test_process_agrees_with_the_rule():
    record = step_memory(["sgd", "adamw"], {"layers": 4, "width": 384, "batch_size": 2})
    none, adamw = record["optimizers"].values()
    assert adamw["rule_bytes"] == adamw["state_bytes"] > 50e6 and none["rule_bytes"] == 0
    for level in ("step", "peak"):
        assert adamw[level] - none[level] == pytest.approx(adamw["rule_bytes"], rel=0.05)
    assert none["peak"] > none["backward"] > 2 * record["weight_bytes"] * 0.95


def a_process(monkeypatch, **result):
    "Let every measurement end like this; the optimizers that were asked for are listed."
    asked = []

    def run(command, **kwargs):
        asked.append(json.loads(command[-1])[0])
        return types.SimpleNamespace(**{"returncode": 0, "stdout": "", "stderr": "", **result})

    monkeypatch.setattr(measuring, "subprocess", types.SimpleNamespace(run=run))
    return asked


LEVELS = {key: 400_000_000 for key in ("state_bytes", "model", "forward", "backward", "step", "peak")}


def test_failed_processes_say_why(monkeypatch):
    a_process(monkeypatch, returncode=1, stderr="Traceback\nValueError: no such thing\n")
    with pytest.raises(RuntimeError, match="measuring adan failed: ValueError: no such thing"):
        step_memory(["adan"])
    a_process(monkeypatch, returncode=-9)
    with pytest.raises(RuntimeError, match="want of memory"):
        step_memory(["adan"])


def test_optimizers_are_checked_before_anything_is_measured(monkeypatch):
    asked = a_process(monkeypatch)
    with pytest.raises(UsageError, match="did you mean adamw"):
        step_memory(["sgd", "adamww"])
    with pytest.raises(ValueError, match="lbfgs"):
        step_memory(["sgd", "lbfgs"])
    assert asked == []


def test_second_derivatives_can_be_measured():
    size = {**MODEL, "layers": 1, "width": 16, "vocab_size": 16, "tokens": 4}
    found = measuring.measure_in_this_process("adahessian", size, "float32", "cpu")
    assert found["state_bytes"] > 0 and {"model", "forward", "backward", "step", "peak"} <= found.keys()


def test_measurement_is_shown_and_kept(tmp_path, monkeypatch):
    asked = a_process(monkeypatch, stdout="a library says hello\n" + json.dumps({"parameters": 1, **LEVELS}))
    done = cli("memory", "resnet18", "--optimizers", "sgd_sai,adamw", "--measure", "--out", tmp_path)
    assert done.exit_code == 0 and asked == ["sgd", "sgd_sai", "adamw"], done.output
    record = json.loads((tmp_path / "memory" / "cpu-float32.json").read_text())
    assert step_memory_path(tmp_path, record) == tmp_path / "memory" / "cpu-float32.json"
    assert (
        record["parameters"] == 29_447_168 and record["optimizers"]["adamw"]["rule_bytes"] > 2 * record["weight_bytes"]
    )
    assert step_memory_table(record).row_count == 3
