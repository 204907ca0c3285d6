"A report that is built again from the same runs says the same, in the same order; and what is missing is said."

import json
import os
import random
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from sgd_sai.analysis.grids import tolerance
from sgd_sai.analysis.gsnr_records import deviations
from sgd_sai.analysis.rankings import ranking
from sgd_sai.analysis.report_runner import rebuild, report_notebooks
from sgd_sai.cli.app import app
from sgd_sai.experiments.tasks.registry import get_task

ROOT = Path(__file__).resolve().parents[2]
REPORTS = report_notebooks(ROOT)


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def texts(notebook):
    "Everything that is shown and is no picture, which depends on the version of matplotlib."
    shown = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            shown += [data[kind] for kind in sorted(data) if kind.startswith("text/")]
    return shown


@pytest.fixture
def clone(tmp_path):
    "The repository, whose reports may be written."
    for name in ("results", "sweeps"):
        os.symlink(ROOT / name, tmp_path / name)
    (tmp_path / "nbs" / "reports").mkdir(parents=True)
    return tmp_path


@pytest.mark.notebook
@pytest.mark.parametrize("name", REPORTS)
def test_a_report_of_a_clean_clone_stays_as_it_was(name, clone):
    path = clone / "nbs" / "reports" / f"{name}.ipynb"
    path.write_text(REPORTS[name].read_text(encoding="utf-8"), encoding="utf-8")
    rebuild(path)
    assert texts(path) == texts(REPORTS[name])


# --- ties -------------------------------------------------------------------------------------------------------------

MANY = [f"optimizer-{i}" for i in range(60)]  # a sort that is not stable keeps the order of a few


def run(optimizer, value, lr=0.1, seed=0):
    return dict(optimizer=optimizer, seed=seed, status="finished", steps=9, hyperparameters={"lr": lr}, state_bytes=4,
                parameters=1, final={"accuracy": value, "val_loss": 1 - value})  # fmt: skip


def labels(names):
    return [name.replace("_", " ") for name in names]


@pytest.mark.parametrize("value", [lambda i: 0.5, lambda i: (0.5, 0.6, 0.7)[i % 3]])
def test_optimizers_that_are_equally_good_keep_their_order(value):
    runs = [run(name, value(i)) for i, name in enumerate(MANY)]
    order = sorted(range(len(MANY)), key=lambda i: -value(i))
    assert list(ranking(get_task("digits-vit"), runs, runs).index) == labels(MANY[i] for i in order)


def test_optimizers_that_are_equally_tolerant_keep_their_order():
    "The share of cells near the best takes few values."
    runs, near = [], {}
    for i, name in enumerate(MANY):
        values = [0.9] + [0.9 if j < i % 3 else 0.1 for j in range(3)]
        near[name] = values.count(0.9)
        runs += [run(name, value, lr=0.1 * (j + 1)) for j, value in enumerate(values)]
    assert list(tolerance(get_task("digits-vit"), runs).index) == labels(sorted(MANY, key=lambda name: -near[name]))


def test_tensors_and_steps_that_are_equally_far_off_keep_their_order():
    steps = list(range(1, 41))
    measured = dict.fromkeys(("norm", "mean", "std", "gsnr"), [1.0] * 40)
    ratios = [(0.5, 0.6, 0.7)[i % 3] for i in range(40)]
    tensors = [
        dict(name=f"tensor-{i}", kind="bias", shape=[2], numel=2, ratio=[ratios[i]] * 40, **measured) for i in range(40)
    ]
    records = {"a-model": {"steps": steps, "tensors": tensors}}
    table = deviations(records, count=40, step=None)
    order = sorted(range(40), key=lambda i: ratios[i])
    assert list(table.tensor) == [f"tensor-{i}" for i in order] and set(table.step) == {1}


def test_the_order_of_files_does_not_matter(tmp_path, monkeypatch):
    "A folder lists its files in any order."
    from sgd_sai.experiments import runs

    files = sorted((ROOT / "results").glob("*.jsonl"))
    mixed = random.Random(0).sample(files, len(files))
    expected = [run["key"] for run in runs.load_runs(ROOT / "results")]
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, p: iter(mixed) if p == "*.jsonl" else glob(self, p))
    assert [run["key"] for run in runs.load_runs(ROOT / "results")] == expected


# --- what is missing --------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_clone_is_an_error(tmp_path):
    done = cli("report", "--root", tmp_path)
    assert done.exit_code == 1 and "it has no results/, sweeps/, nbs/reports/" in done.output
    for name in ("results", "sweeps", "nbs/reports"):
        (tmp_path / name).mkdir(parents=True)
    done = cli("report", "--root", tmp_path)
    assert done.exit_code == 1 and "nbs/reports has no notebook" in done.output


KERNEL = {"kernelspec": {"name": "none", "display_name": "none"}}
BROKEN = {
    "{": "is no notebook",
    "[]": "is no notebook",
    "null": "is no notebook",
    json.dumps({"cells": [], "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}): "no Jupyter kernel 'none'",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_report_that_cannot_be_run_is_one_line(clone, text):
    (clone / "nbs" / "reports" / "it.ipynb").write_text(text)
    done = cli("report", "--root", clone)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    assert BROKEN[text] in " ".join(done.output.split()) and "1 of 1 reports failed: it" in done.output


def test_a_cell_that_never_ends_is_one_line(clone):
    cells = [nbformat.v4.new_code_cell("import time; time.sleep(60)")]
    path = clone / "nbs" / "reports" / "it.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    with pytest.raises(RuntimeError, match="a cell takes more than 1 s"):
        rebuild(path, timeout=1)
