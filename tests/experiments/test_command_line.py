"The command line as such: its commands, shared options, plugins, packing. What commands compute has tests of its own."

import inspect
import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from sgd_sai.cli import options
from sgd_sai.cli.app import COMMANDS, app
from sgd_sai.experiments.optimizers import optimizer_names

PLUGIN = """
from sgd_sai import SGDSaI
from sgd_sai.experiments.optimizer_entry import OptimizerEntry
from sgd_sai.experiments.optimizers import register_optimizer

register_optimizer(OptimizerEntry("from_a_file", SGDSaI, "From a file"), replace=True)
"""


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def words(done):
    "What a command has printed, without frames and line ends."
    return " ".join(done.output.replace("│", " ").split())


def test_every_command_has_a_name_and_a_sentence():
    registered = {command.name: command.callback for command in app.registered_commands}
    assert registered == COMMANDS and all(function.__doc__ for function in COMMANDS.values())
    assert all(function.__name__ == f"{name}_command" for name, function in COMMANDS.items())


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("pack", "report")])
def test_commands_with_names_take_plugins(name):
    "A task, an optimizer or a scale rule of one's own is known to every command that looks such names up."
    parameter = inspect.signature(COMMANDS[name]).parameters["plugin"]
    assert parameter.annotation is options.PluginOption
    done = cli(name, *(["a file"] if name in ("sweep", "repeat", "rank") else []), "--plugin", "nowhere.py")
    assert done.exit_code == 2 and "no plugin file" in words(done), done.output


@pytest.mark.parametrize("name", [name for name, f in COMMANDS.items() if "device" in inspect.signature(f).parameters])
def test_a_wrong_device_is_said_by_every_command(name):
    done = cli(name, *(["a file"] if name in ("sweep", "repeat") else []), "--device", "cdua")
    assert done.exit_code == 2 and "unknown device 'cdua', did you mean cuda?" in words(done), done.output


def test_help_names_the_optimizers_of_the_registry():
    helped = words(cli("compare", "--help"))
    assert all(name in helped for name in optimizer_names("training"))


def test_optimizer_of_a_plugin_is_listed(tmp_path):
    "In a process of its own, since plugins stay loaded."
    (tmp_path / "mine.py").write_text(PLUGIN)
    command = [sys.executable, "-m", "sgd_sai", "memory", "list", "--plugin", str(tmp_path / "mine.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "From a file" in done.stdout, done.stderr


def test_runs_are_packed_and_unpacked_without_a_change(tmp_path):
    trained = cli("compare", "--seeds", 1, "--steps", 2, "-o", "sgdm", "--device", "cpu", "--out", tmp_path)
    assert trained.exit_code == 0, trained.output
    (path,) = (tmp_path / "digits-vit").glob("*.json")
    run = json.loads(path.read_text())
    done = cli("pack", tmp_path)
    assert done.exit_code == 0 and "digits-vit.jsonl" in words(done).replace(" ", "") and not path.exists()
    assert [json.loads(line) for line in (tmp_path / "digits-vit.jsonl").read_text().splitlines()] == [run]
    assert cli("pack", tmp_path, "--task", "fashion-vit", "--unpack").exit_code == 0 and not path.exists()
    done = cli("pack", tmp_path, "--unpack")
    assert done.exit_code == 0 and "unpacked 1 runs" in words(done) and json.loads(path.read_text()) == run
    assert cli("pack", tmp_path / "nowhere").exit_code == 2


@pytest.mark.parametrize("error, exit_code", [
    (options.UsageError("what"), 2),
    (OSError("what"), 1),
    (RuntimeError("what"), 1),
    (ImportError("what"), 1),
    (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_errors_in_words(error, exit_code, capsys):
    with pytest.raises((typer.BadParameter, typer.Exit)) as caught, options.in_words():
        raise error
    assert caught.value.exit_code == exit_code
    assert "what" in (str(caught.value) + capsys.readouterr().err) or exit_code == 130


def test_errors_of_the_program_itself_are_not_hidden():
    with pytest.raises(ZeroDivisionError), options.in_words():
        raise ZeroDivisionError


def test_settings_and_names():
    assert options.parse_settings(["a.lr=1e-3", "a.scale=sqrt_numel"]) == {"a": {"lr": "1e-3", "scale": "sqrt_numel"}}
    assert options.split_names(" a,b ,,") == ["a", "b"]
    for wrong in ("lr=1", "a.lr", ".lr=1", "a.=1"):
        with pytest.raises(options.UsageError, match="is no setting"):
            options.parse_settings([wrong])
