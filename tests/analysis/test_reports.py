"Reports follow the run files (`sgd-sai report`), `sgd-sai repeat` makes one again, and tables say what the files say."

import json
import math
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from sgd_sai.analysis.differences import difference, difference_frame, difference_matrix, verdict
from sgd_sai.analysis.grids import grid_of, plot_grids, tolerance
from sgd_sai.analysis.rankings import (
    Experiment,
    at_edge,
    at_measured_cost,
    extra_frame,
    load_experiment,
    phases,
    plot_curves,
    plot_ranking,
    ranking,
    repository,
)
from sgd_sai.analysis.report_runner import report_notebooks
from sgd_sai.analysis.tables import markdown_table
from sgd_sai.cli.app import app
from sgd_sai.experiments.runs import load_runs, run_path, spec_of
from sgd_sai.experiments.spread import Spread
from sgd_sai.experiments.sweep import read_sweep, run_sweep
from sgd_sai.experiments.tasks.registry import get_task
from sgd_sai.experiments.tasks.task import POINTS

ROOT = Path(__file__).resolve().parents[2]


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A repository with one sweep, its runs, and one report that prints their mean accuracy."
    root = tmp_path_factory.mktemp("site")
    for folder in ("results", "sweeps", "nbs/reports"):
        (root / folder).mkdir(parents=True)
    (root / "sweeps/tiny.yaml").write_text("task: digits-vit\noptimizers: [sgd_sai, adamw]\nseeds: 2\nsteps: 6\n")
    run_sweep(read_sweep(root / "sweeps/tiny.yaml"), root / "results", device="cpu")
    code = (
        "from sgd_sai.analysis.rankings import ranking, sweep_runs\n"
        "task, runs = sweep_runs('tiny')\n"
        "print(ranking(task, runs, runs)['mean'].round(6).to_dict())"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Report"), nbformat.v4.new_code_cell(code)])
    book.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(book, root / "nbs/reports/tiny.ipynb")
    (root / "nbs/analysis").mkdir()
    exporting = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("#| default_exp analysis.something")])
    nbformat.write(exporting, root / "nbs/analysis/code.ipynb")
    return root


def shown(root):
    cells = nbformat.read(root / "nbs/reports/tiny.ipynb", as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))


def test_a_changed_run_file_changes_the_page(site, tmp_path):
    root = tmp_path / "site"
    shutil.copytree(site, root)
    assert list(report_notebooks(root)) == ["tiny"]
    done = cli("report", "--root", root)
    assert done.exit_code == 0 and "rebuilt, and changed" in done.output
    first = shown(root)
    assert "AdamW" in first and "SGD-SaI" in first
    assert "as it was" in cli("report", "tiny", "--root", root).output and shown(root) == first

    run = load_runs(root / "results")[0]
    path = run_path(root / "results", spec_of(run))
    path.write_text(json.dumps(run | {"final": {"val_loss": 1.0, "accuracy": 0.987654}}))
    assert "rebuilt, and changed" in cli("report", "--root", root).output and shown(root) != first

    changed = shown(root)
    path.unlink()
    done = cli("report", "--root", root)
    assert done.exit_code == 1 and "sgd-sai sweep" in done.output and "Traceback" not in done.output
    assert shown(root) == changed  # a report that fails keeps what it showed


def test_report_says_what_is_wrong(tmp_path, site):
    assert cli("report", "tin", "--root", site).exit_code == 2
    assert "clone of the repository" in cli("report", "--root", tmp_path).output or not report_notebooks(tmp_path)
    with pytest.raises(FileNotFoundError, match="clone of the repository"):
        repository(tmp_path)


def test_repeat_makes_the_same_run(site, tmp_path):
    run = load_runs(site / "results")[0]
    path = run_path(site / "results", spec_of(run))
    done = cli("repeat", path, "--device", "cpu")
    assert done.exit_code == 0 and done.output.strip().endswith("the same")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(run | {"final": run["final"] | {"val_loss": 0.5}}))
    done = cli("repeat", other, "--device", "cpu")
    assert done.exit_code == 1 and "not the same" in done.output
    for wrong, text in (
        ("{}", "no run file"),
        ("[", "no run file"),
        (json.dumps(run | {"data": "0" * 12}), "other data"),
    ):
        other.write_text(wrong)
        done = cli("repeat", other, "--device", "cpu")
        assert done.exit_code == 2 and text in done.output.replace("\n", " "), done.output
    assert cli("repeat", tmp_path / "none.json").exit_code == 1


def fabricated(optimizer, values, lr=0.01, wd=0.1, status="finished"):
    return [
        dict(
            optimizer=optimizer,
            seed=seed,
            status=status,
            steps=100,
            hyperparameters={"lr": lr, "weight_decay": wd},
            final={"accuracy": v, "val_loss": 1 - v} if v is not None else {},
            parameters=10,
            state_bytes=40,
            history=[dict(step=s, accuracy=(v or 0) * s / 100) for s in range(0, 101, 25)],
        )
        for seed, v in enumerate(values)
    ]


def test_ranking_and_differences_are_those_of_the_runs():
    task = get_task("digits-vit")
    runs = (
        fabricated("sgd_sai", [0.5, 0.7])
        + fabricated("adamw", [0.8, 0.9], 0.1)
        + fabricated("adan", [0.1, 0.2], status="diverged")
    )
    frame = ranking(
        task,
        runs,
        runs + fabricated("adamw", [0.0], 0.01),
        {"optimizers": {"adamw": {"ms": {"median": 2.0}, "ratio": {"median": 1.5}}}},
    )
    assert list(frame.index) == ["AdamW", "SGD-SaI", "Adan"] and frame.loc["AdamW", "mean"] == pytest.approx(0.85)
    assert (
        frame.loc["AdamW", "edge"] == "high"
        and frame.loc["AdamW", "cells"] == 2
        and frame.loc["AdamW", "run s"] == pytest.approx(0.2)
    )
    assert (
        frame.loc["Adan", "diverged"] == 2
        and math.isnan(frame.loc["Adan", "mean"])
        and frame.loc["SGD-SaI", "state B/param"] == 4
    )
    gap = difference(task, runs, "adamw", "sgd_sai")
    assert (
        gap.spread.mean == pytest.approx(0.25)
        and gap.spread.std == pytest.approx(0.0707, abs=1e-4)
        and (gap.spread.n, gap.better) == (2, 2)
    )
    assert verdict(gap.spread, POINTS) == "open"  # two seeds, and t is 12.7
    assert verdict(Spread(0.02, 0.05, 3), POINTS) == "open"  # as large as its noise
    assert at_edge(runs, "sgd_sai", 0.01) == "low" and phases(task, runs).loc["AdamW", "50%"] == pytest.approx(0.425)
    assert len(plot_ranking([(task, runs)]).axes) == 1


def test_loss_counts_downwards():
    task = get_task("shakespeare-gpt")
    runs = [
        run | {"final": {"val_loss": run["final"]["accuracy"]}}
        for run in fabricated("sgd_sai", [1.5, 1.7]) + fabricated("adamw", [1.8, 1.9])
    ]
    assert difference(task, runs, "sgd_sai", "adamw").spread.mean == pytest.approx(0.25) and list(
        ranking(task, runs, runs).index
    ) == ["SGD-SaI", "AdamW"]


def test_grids_count_the_cells_near_the_best():
    task = get_task("digits-vit")
    runs = [
        run
        for lr, wd, v in ((0.1, 0.1, 0.9), (0.1, 1.0, 0.895), (1.0, 0.1, 0.5))
        for run in fabricated("sgd_sai", [v], lr, wd)
    ] + fabricated("sgd_sai", [0.99], 1.0, 1.0, "diverged")
    assert math.isnan(grid_of(task, runs, "sgd_sai").loc[1.0, 1.0])
    row = tolerance(task, runs).loc["SGD-SaI"]
    assert (row["cells"], row["diverged"], row["near"], row["best"]) == (4, 1, 0.5, 0.9)
    assert len(plot_grids(task, runs).axes) == 5  # one panel and four empty ones


def test_an_experiment_finds_its_grid_and_its_costs(site, tmp_path):
    root = tmp_path / "site"
    shutil.copytree(site, root)
    (root / "sweeps/best.yaml").write_text(
        "task: digits-vit\noptimizers: [sgd_sai, adamw]\nseeds: 2\nsteps: 6\nbest_of: tiny.yaml\n"
    )
    found = load_experiment("best", root)
    assert (
        found.costs is None
        and len(found.runs) == 4
        and found.setting() == "6 steps, 2 seeds; tuned with 6 steps and 2 seeds"
    )
    assert list(found.ranking().cells) == [1, 1] and len(plot_curves(found).axes) == 2  # no time without a measurement
    (root / "sweeps/better.yaml").write_text(
        "task: digits-vit\noptimizers: [adamw]\nseeds: 1\nsteps: 6\nbest_of: best.yaml\n"
    )
    twice = load_experiment("better", root)  # chosen from what was chosen
    assert [len(stage) for stage in twice.stages] == [4, 4] and len(twice.tuned) == 8
    assert twice.setting() == "6 steps, 1 seed; tuned with 6 steps and 2 seeds, then 6 steps and 2 seeds"
    (root / "results/costs").mkdir()
    (root / "results/costs/digits-vit.json").write_text(
        json.dumps({"optimizers": {"adamw": {"ms": {"median": 500.0}, "ratio": {"median": 2.0}}}})
    )
    found = load_experiment("best", root)
    assert found.ranking().loc["AdamW", "run s"] == pytest.approx(3.0) and math.isnan(
        found.ranking().loc["SGD-SaI", "run s"]
    )
    timed = at_measured_cost(found.runs, found.costs)
    assert {run["optimizer"] for run in timed} == {"adamw"} and timed[0]["history"][-1]["seconds"] == pytest.approx(3.0)
    assert (
        found.runs[0]["history"][-1]["seconds"] != timed[0]["history"][-1]["seconds"]
        and len(plot_curves(found).axes) == 4
    )


def test_differences_and_extras_are_tables_over_tasks_and_seeds():
    digits, text = get_task("digits-vit"), get_task("shakespeare-gpt")
    runs = (
        fabricated("sgd_sai", [0.50, 0.60, 0.70])
        + fabricated("adamw", [0.75, 0.85, 0.95])
        + fabricated("adan", [0.1], status="diverged")
    )
    losses = [run | {"final": {"val_loss": run["final"]["accuracy"]}} for run in runs]
    frame = difference_frame(
        [Experiment("a", digits, runs, [runs], None), Experiment("b", text, losses, [losses], None)], "adamw", "sgd_sai"
    )
    assert (
        frame.loc["digits-vit", "unit"] == "points"
        and frame.loc["digits-vit", "mean"] == pytest.approx(25)
        and frame.loc["digits-vit", "verdict"] == "better"
        and frame.loc["digits-vit", "better"] == "3 of 3"
    )
    assert (
        frame.loc["shakespeare-gpt", "unit"] == "nats"
        and frame.loc["shakespeare-gpt", "mean"] == pytest.approx(-0.25)
        and frame.loc["shakespeare-gpt", "verdict"] == "worse"
    )
    table = difference_matrix(
        [Experiment("a", digits, runs, [runs], None), Experiment("b", text, losses, [losses], None)],
        ["adamw", "adan", "po:Lion"],
        "sgd_sai",
    )
    assert table.loc["digits-vit", "AdamW"] == "+25.00 [+25.00, +25.00] better" and list(table["Lion"]) == ["", ""]
    assert table.loc["shakespeare-gpt", "AdamW"] == "-0.250 [-0.250, -0.250] worse"
    assert table.loc["digits-vit", "Adan"] == "+nan (no common seed) open"  # it diverged
    extras = extra_frame([run | {"extra": {"bleu": 1.0 + run["seed"]}} for run in runs], ["bleu"])
    assert list(extras.index) == ["SGD-SaI", "AdamW"] and extras.loc["AdamW", ("bleu", "mean")] == 2.0


def test_a_claim_is_held_against_every_task(monkeypatch):
    "It holds when it is worse on none, in part when it is on some; differences are read in the unit of the task."
    from sgd_sai.analysis import verdicts

    digits, gpt, ddpm = map(get_task, ("digits-vit", "shakespeare-gpt", "fashion-ddpm"))

    def loss(optimizer, values):
        return [
            run | {"final": {"val_loss": v}, "task": "x"}
            for run, v in zip(fabricated(optimizer, values), values, strict=True)
        ]

    adamw = fabricated("adamw", [0.90, 0.91, 0.92])
    sweeps = {
        "up": (digits, fabricated("sgd_sai", [0.95, 0.96, 0.97]) + adamw),
        "even": (digits, fabricated("sgd_sai", [0.901, 0.912, 0.921]) + adamw),
        "open": (digits, fabricated("sgd_sai", [0.90, 0.93, 0.92]) + adamw),
        "down": (gpt, loss("sgd_sai", [1.9, 1.91, 1.92]) + loss("adamw", [1.8, 1.81, 1.82])),
        "small": (ddpm, loss("sgd_sai", [0.1, 0.1, 0.1]) + loss("adamw", [0.095, 0.096, 0.095])),
    }
    monkeypatch.setattr(verdicts, "sweep_runs", sweeps.get)
    assert verdicts.compared("up", "sgd_sai", "adamw") == (
        "+5.00 [+5.00, +5.00] points (digits-vit, 3 seeds)",
        "better",
    )
    assert verdicts.compared("even", "sgd_sai", "adamw")[1] == "even"
    assert verdicts.compared("down", "sgd_sai", "adamw") == (
        "-0.100 [-0.100, -0.100] nats (shakespeare-gpt, 3 seeds)",
        "worse",
    )
    assert verdicts.compared("small", "sgd_sai", "adamw") == (
        "-0.0047 [-0.0061, -0.0032] squared error (fashion-ddpm, 3 seeds)",
        "worse",
    )

    def said(*names):
        return verdicts.at_least_even(names, "sgd_sai", "adamw")[1]

    assert (said("up", "even"), said("up", "down"), said("down", "small")) == (
        verdicts.HOLDS,
        verdicts.PART,
        verdicts.NOT,
    )
    assert (said("up", "open"), said("up", "down", "open"), said("down", "open"), said("open")) == (
        verdicts.OPEN,
        verdicts.PART,
        verdicts.NOT,
        verdicts.OPEN,
    )
    assert [
        verdicts.at_least_even(names, "sgd_sai", "adamw", better=True)[1]
        for names in (["up"], ["up", "even"], ["even"])
    ] == [verdicts.HOLDS, verdicts.PART, verdicts.NOT]


def test_every_claim_is_counted_under_its_verdict(monkeypatch):
    from sgd_sai.analysis import claims, verdicts

    monkeypatch.chdir(ROOT)
    papers = {"Adan": claims.adan_claims(), "AdaHessian": claims.adahessian_claims(), "this site": claims.own_claims()}
    papers["SGD-SaI"] = claims.sgd_sai_training() + claims.sgd_sai_costs() + claims.sgd_sai_behaviour()
    table = claims.tally()
    assert list(table.columns) == list(verdicts.VERDICTS)
    for paper, given in papers.items():
        assert table.loc[paper].sum() == len(given), paper
        for said in verdicts.VERDICTS:
            assert table.loc[paper, said] == sum(claim.verdict == said for claim in given)


def test_of_equal_accuracies_the_lower_loss_is_the_best(tmp_path):
    "Accuracy on few images has many ties; the first of the grid, its lowest learning rate, is not what a tie means."
    from sgd_sai.experiments.sweep import best_of_runs, best_settings, rank_of

    (tmp_path / "tune.yaml").write_text(
        "task: digits-vit\noptimizers: [sgdm]\nseeds: 1\nsteps: 4\n"
        "grid:\n  sgdm: {lr: [0.01, 0.1, 1.0], weight_decay: 0.0}\n"
    )
    task, sweep = get_task("digits-vit"), read_sweep(tmp_path / "tune.yaml")
    runs = run_sweep(sweep, tmp_path, device="cpu")["runs"]
    final = {
        0.01: {"accuracy": 0.5, "val_loss": 2.0},
        0.1: {"accuracy": 0.5, "val_loss": 1.0},
        1.0: {"accuracy": 0.4, "val_loss": 0.5},
    }
    for run in runs:
        run["final"] = final[run["hyperparameters"]["lr"]]
        run_path(tmp_path, spec_of(run)).write_text(json.dumps(run))
    assert best_settings(sweep, task.load(), tmp_path)["sgdm"][0]["lr"] == 0.1 and best_of_runs(task, runs)["sgdm"] == {
        "lr": 0.1,
        "weight_decay": 0.0,
    }
    assert rank_of(task, runs[0] | {"status": "diverged"}) is None


def test_a_column_of_empty_texts_is_empty():
    assert markdown_table(pd.DataFrame({"a": [1], "b": [""]})).split("\n")[-1] == "| 1 |  |"
    assert markdown_table(pd.DataFrame({"a": [], "b": []})).split("\n") == ["| a | b |", "| ---: | ---: |"]


def test_tables_are_markdown_with_the_digits_of_pandas():
    frame = pd.DataFrame(
        {"lr": [0.3, 0.001], "name": ["a|b", "x" * 80], ("final", "mean"): [0.5, math.nan]},
        index=pd.MultiIndex.from_tuples([("digits", "SGDM"), ("digits", "AdamW")], names=["task", "optimizer"]),
    )
    assert markdown_table(frame).split("\n") == [
        "| task | optimizer | lr | name | final mean |",
        "| :--- | :--- | ---: | :--- | ---: |",
        r"| digits | SGDM | 0.300 | a\|b | 0.5 |",
        f"|  | AdamW | 0.001 | {'x' * 80} |  |",
    ]
    assert markdown_table(pd.Series([1, 2], name="count")) == "| count |\n| ---: |\n| 1 |\n| 2 |"


@pytest.mark.parametrize("folder", ["analysis", "reports"])
def test_no_output_makes_the_builder_load_scripts(folder):
    "Quarto adds require.js and jQuery to a page as soon as one output of it is HTML."
    found = []
    for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", ()):
                if {"text/html", "application/javascript"} & set(output.get("data", ())):
                    found.append((path.name, cell.source[:60]))
    assert found == []


@pytest.mark.parametrize("path", sorted((ROOT / "nbs" / "reports").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_report_says_what_its_spread_is(path):
    "A page that shows a standard deviation links to the page that says which one."
    text = path.read_text(encoding="utf-8")
    shown = [word for word in ("| std |", " std |", "±") if word in text]
    assert not shown or "experiments/spread.ipynb" in text, shown
