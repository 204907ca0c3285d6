"What a person sees: help at once, the version, tables and bars on terminals of every width."

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from run_files import outcome
from typer.testing import CliRunner

import sgd_sai
from sgd_sai.benchmarks.step_time import choose, measure_speed
from sgd_sai.cli import options
from sgd_sai.cli.app import COMMANDS, app
from sgd_sai.experiments.compare import summary_frame, summary_table
from sgd_sai.experiments.optimizers import optimizer_names
from sgd_sai.experiments.progress import _Bars, _columns
from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.sweep_results import best_table, sweep_frame
from sgd_sai.experiments.tasks.registry import get_task
from sgd_sai.experiments.tasks.task import Data

TASK = get_task("digits-vit")
DATA = Data(range(1438), range(359), {}, "0" * 12)
WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["sgd-sai", *{arguments!r}]
try:
    runpy.run_module("sgd_sai", run_name="__main__")
except SystemExit as e:
    code = e.code
heavy = {{"torch", "pandas", "matplotlib", "transformers", "accelerate", "numpy"}} & set(sys.modules)
assert not code and not heavy, (code, heavy)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=str)
def test_help_does_not_wait_for_torch(arguments):
    "`python -m sgd_sai` and the installed script are the same function."
    command = [sys.executable, "-c", WITHOUT_TORCH.format(arguments=arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout) > 10, done.stderr


def test_the_script_starts_the_same_function():
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "sgd-sai"]
    assert script.value == "sgd_sai.__main__:main"


def test_version():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0 and done.output.strip() == f"sgd-sai-lab {sgd_sai.__version__}"


# --- tables -----------------------------------------------------------------------------------------------------------


def runs_of(names):
    runs = []
    for i, name in enumerate(names):
        for seed in range(3):
            spec = make_spec(TASK, DATA, name, seed, steps=240)
            runs.append({"schema": 1, "key": spec.key, **vars(spec), **outcome(0.123456 * (i + 1 + seed))})
    return runs


def shown(table, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    options.print_table(table)
    return capsys.readouterr().out


def compared():
    runs = runs_of(["sgd_sai", "sgd_sai_sqrtn", "adamw"])
    return summary_table(TASK, summary_frame(TASK, runs))


def swept():
    runs = runs_of(["sgd_sai", "adamw"])
    return best_table(TASK, sweep_frame(TASK, runs))


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
@pytest.mark.parametrize("make", [compared, swept])
def test_numbers_are_never_cut(make, width, capsys, monkeypatch):
    table = make()
    text = shown(table, width, capsys, monkeypatch)
    assert "…" not in text
    for column in table.columns:
        for cell in column.cells:
            assert str(cell) in text, (column.header, cell)


def test_a_wide_terminal_has_a_table_and_a_narrow_one_has_paragraphs(capsys, monkeypatch):
    wide, narrow = (shown(compared(), width, capsys, monkeypatch).splitlines() for width in (80, 40))
    assert sum(line.startswith(("SGD-SaI", "AdamW")) and line.rstrip().endswith(" B") for line in wide) == 3
    assert max(map(len, narrow)) <= 40 and "AdamW" in narrow and "  lr 0.003  wd 0.1" in "\n".join(narrow)


def test_cells_that_look_like_markup_are_shown_as_they_are(capsys, monkeypatch):
    table = Table("name", "value")
    table.add_row("x" * 50, "[1, 2]")
    assert "[1, 2]" in shown(table, 20, capsys, monkeypatch)


# --- bars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["digits-vit", "pydoc-gpt"])
@pytest.mark.parametrize("width", [40, 60, 73, 80, 83, 86, 90, 100, 200])
def test_bars_of_a_comparison_fit(width, task):
    task = get_task(task)
    specs = [make_spec(task, DATA, name, steps=2000) for name in ("sgd_sai_sqrtn", "adamw")]
    console = Console(width=width, force_terminal=True, record=True, file=open("/dev/null", "w"))
    progress = Progress(*_columns(task, specs, width), console=console, expand=True)
    bars = _Bars(task, specs, progress, console)
    bars.show(specs[0], "running", 1999, 12.345, {task.metric: 0.1234})
    bars.show(specs[1], "found", 2000, None, {task.metric: 0.1234})
    console.print(progress.get_renderable())
    text = console.export_text()
    assert "…" not in text and "1999/2000" in text and "SGD-SaI, √n control, seed 0" in text
    assert "0.1234" in text or width < 80


def test_speed_shows_every_round(monkeypatch):
    news = []
    measure_speed([(3,)] * 2, choose(["sgd_sai", "muon_sai"]), rounds=3, progress=lambda *a: news.append(a))
    labels = list(dict.fromkeys(label for _, _, label in news))
    assert labels == ["memory bandwidth", "SGDSaI", "MuonSaI", "torch SGD, fused", "first step"]
    assert [done for done, _, label in news if label == "SGDSaI"] == [0, 1, 2, 3]
    assert [done for done, _, label in news if label == "MuonSaI"] == [3, 4, 5, 6]
    assert {total for _, total, label in news if label.endswith("SaI")} == {6}


def test_speed_has_muon():
    assert "muon_sai" in optimizer_names("benchmark")
    done = CliRunner().invoke(app, ["speed", "3x40", "-o", "muon_sai", "--rounds", "3"])
    assert done.exit_code == 0 and "MuonSaI" in done.output, done.output


def test_what_is_none_stays_as_it_was(monkeypatch):
    "The bar of a measurement, which does not know its end at first."
    calls = []
    monkeypatch.setattr("rich.progress.Progress.update", lambda self, task, **news: calls.append(news))
    with options.progress_bar("label") as update:
        update(None, None, "first step")
        update(3)
    assert calls[0] == {"completed": None, "total": None, "description": "first step"}
    assert calls[1] == {"completed": 3, "total": None, "description": None}
