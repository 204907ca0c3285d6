"Loss against rate, steps to a target, ranks with intervals and rates that transfer: each with values known by hand."

import math

import numpy as np
import pytest

from sgd_sai.analysis.rank_intervals import plot_ranks, rank_frame
from sgd_sai.analysis.rankings import STATE_COLORS, Experiment, is_frugal
from sgd_sai.analysis.rate_figures import RateCell, plot_rates, rate_cells, rate_envelope, rate_frame
from sgd_sai.analysis.targets import NOT_REACHED, default_target, steps_to_target, target_frame, target_texts
from sgd_sai.analysis.transfer import best_rate, plot_transfer, rate_table
from sgd_sai.experiments.optimizers import optimizer_style
from sgd_sai.experiments.tasks.registry import get_task

DIGITS, TEXT, DDPM = map(get_task, ("digits-vit", "shakespeare-gpt", "fashion-ddpm"))


def run_of(optimizer, final=None, lr=0.1, wd=0.0, seed=0, history=(), bytes_per_parameter=4, metric="val_loss"):
    "A run record; without a final value it diverged."
    return dict(
        optimizer=optimizer,
        seed=seed,
        status="diverged" if final is None else "finished",
        hyperparameters={"lr": lr, "weight_decay": wd} if wd else {"lr": lr},
        final={} if final is None else {metric: final},
        history=[{"step": step, metric: value} for step, value in history],
        steps=100,
        parameters=10,
        state_bytes=10 * bytes_per_parameter,
    )


# --- loss against rate ----------------------------------------------------------------------------------------------


def test_a_cell_is_a_mean_over_seeds_and_diverges_with_any_of_them():
    runs = [
        run_of("adamw", 1.0, 0.1, 0.5, seed=0),
        run_of("adamw", 2.0, 0.1, 0.5, seed=1),
        run_of("adamw", 3.0, 0.01),
        run_of("adamw", 1.0, 1.0, seed=0),
        run_of("adamw", None, 1.0, seed=1),
        run_of("sgdm", 0.0, 0.5),
    ]
    cells = rate_cells(TEXT, runs, "adamw")
    assert cells[:2] == [RateCell(0.01, 0.0, 3.0), RateCell(0.1, 0.05, 1.5)]
    assert cells[2].lr == 1.0 and math.isnan(cells[2].value) and len(cells) == 3


def test_cells_have_the_metric_that_is_asked_for():
    run = run_of("adamw", 0.3) | {"final": {"accuracy": 0.9, "val_loss": 0.3}}
    assert [rate_cells(DIGITS, [run], "adamw", metric)[0].value for metric in (None, "val_loss")] == [0.9, 0.3]


@pytest.mark.parametrize(("metric", "sign"), [("val_loss", 1), ("accuracy", -1)])
def test_the_envelope_has_one_valley_through_real_cells(metric, sign):
    points = [(1, 5.0), (2, 6.0), (3, 3.0), (4, 1.0), (4, 2.0), (5, 4.0), (6, 2.0), (7, math.nan), (8, 7.0)]
    cells = [RateCell(float(lr), 0.0, sign * value) for lr, value in points]
    line = rate_envelope(cells, metric)
    assert [(cell.lr, sign * cell.value) for cell in line] == [(1, 5), (3, 3), (4, 1), (6, 2), (8, 7)]


def test_an_envelope_of_equal_cells_keeps_them_and_of_diverged_ones_is_empty():
    assert [cell.lr for cell in rate_envelope([RateCell(lr, 0.0, 1.0) for lr in (1.0, 2.0, 3.0)], "val_loss")] == [
        1.0,
        2.0,
        3.0,
    ]
    assert rate_envelope([RateCell(1.0, 0.0, math.nan)], "val_loss") == []


def searched():
    "Losses of three optimizers; AdamW is near its best (1.00) from 0.01 to 0.1, and a cell between is not."
    losses = {0.001: 1.2, 0.01: 1.04, 0.03: 1.3, 0.1: 1.0, 1.0: None}
    runs = [run_of("adamw", loss, lr, 0.1) for lr, loss in losses.items()]
    runs += [run_of("sgdm", loss, lr) for lr, loss in ((0.1, 0.9), (1.0, 0.94), (10.0, 0.96))]
    return runs + [run_of("po:Lion", None, 0.1)]


def test_the_table_of_rates_says_how_wide_the_valley_is():
    frame = rate_frame(TEXT, searched())
    assert list(frame.index) == ["SGDM", "AdamW", "Lion"]
    adamw = frame.loc["AdamW"]
    assert adamw[["best", "lr", "lr x wd", "edge"]].tolist() == [1.0, 0.1, pytest.approx(0.01), ""]
    assert adamw[["from", "to", "range"]].tolist() == [0.01, 0.1, pytest.approx(10)]
    assert adamw[["near", "cells", "diverged"]].tolist() == [0.4, 5, 1]
    assert frame.loc["SGDM", ["edge", "from", "to"]].tolist() == ["low", 0.1, 1.0]
    lion = frame.loc["Lion"]
    assert math.isnan(lion["best"]) and lion[["near", "cells", "diverged"]].tolist() == [0.0, 1, 1]


@pytest.mark.parametrize(
    ("task", "metric", "values", "near"),
    [
        (DIGITS, "accuracy", (0.9, 0.891, 0.889), 2),  # within 0.01
        (DIGITS, "val_loss", (0.3, 0.34, 0.36), 2),  # within 0.05
        (DDPM, "val_loss", (0.1, 0.104, 0.106), 2),  # within 0.005: a squared error of 0.05 would be all of it
    ],
)
def test_what_is_near_depends_on_the_unit(task, metric, values, near):
    runs = [run_of("adamw", value, lr, metric=metric) for lr, value in zip((0.1, 0.01, 0.001), values, strict=True)]
    frame = rate_frame(task, runs, metric=metric)
    assert frame.loc["AdamW", "near"] == pytest.approx(near / 3) and frame.loc["AdamW", "best"] == values[0]
    assert rate_frame(task, runs, close=1.0, metric=metric).loc["AdamW", "near"] == 1


def drawn(ax, marker):
    "The points of a panel that have this marker."
    lines = [line for line in ax.lines if line.get_marker() == marker]
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines]


def test_every_cell_is_in_its_panel_and_what_does_not_fit_stands_at_the_edge():
    runs = [*searched(), run_of("adamw", 5.0, 0.3, 0.1)]
    adamw, sgdm, lion = plot_rates(TEXT, runs, columns=3).axes[:3]
    assert [ax.get_title(loc="left") for ax in (adamw, sgdm, lion)] == ["AdamW", "SGDM", "Lion"]
    dots = drawn(adamw, "o")
    assert sorted(set(dots)) == [(0.001, 1.2), (0.01, 1.04), (0.03, 1.3), (0.1, 1.0)]
    assert len(dots) == 5 and dots.count((0.1, 1.0)) == 2  # the dot and the ring of the best cell
    edge = 0.9 + 0.5  # half a nat above the best of all
    assert drawn(adamw, "^") == [(0.3, pytest.approx(edge))]
    assert drawn(adamw, "x") == [(1.0, pytest.approx(edge))] and drawn(lion, "x") == [(0.1, pytest.approx(edge))]
    for ax in (adamw, sgdm, lion):
        level = ax.lines[0]
        assert set(level.get_ydata()) == {1.0} and level.get_color() == optimizer_style("adamw")[1]
    decades = [np.diff(np.log10(ax.get_xlim()))[0] for ax in (adamw, sgdm, lion)]
    assert decades == pytest.approx([3.3] * 3)  # three decades were tried with AdamW, and a tenth of room


def test_accuracies_are_in_percent_and_bad_ones_below():
    runs = [run_of("sgdm", value, lr, metric="accuracy") for lr, value in ((0.1, 0.95), (1.0, 0.2), (10.0, None))]
    ax = plot_rates(DIGITS, runs).axes[0]
    assert (0.1, 95.0) in drawn(ax, "o") and drawn(ax, "v") == [(1.0, 85.0)] and drawn(ax, "x") == [(10.0, 85.0)]
    assert drawn(plot_rates(DIGITS, runs, span=20).axes[0], "v") == [(1.0, 75.0)]


def test_the_best_of_every_optimizer_is_seen():
    runs = [run_of("adamw", 0.95, 0.1, metric="accuracy"), run_of("sgdm", 0.7, 0.1, metric="accuracy")]
    runs.append(run_of("sgdm", 0.5, 1.0, metric="accuracy"))
    ax = next(ax for ax in plot_rates(DIGITS, runs).axes if ax.get_title(loc="left") == "SGDM")
    assert (0.1, 70.0) in drawn(ax, "o") and drawn(ax, "v") == [(1.0, pytest.approx(95 - 1.2 * 25))]
    assert ax.get_ylim()[0] < 65


def test_a_figure_of_rates_needs_runs():
    for runs, names in (([], None), (searched(), ["adan"])):
        with pytest.raises(ValueError, match="runs are needed"):
            plot_rates(TEXT, runs, names)


# --- steps to a target ----------------------------------------------------------------------------------------------


def test_the_first_crossing_is_interpolated_and_a_later_fall_does_not_count():
    history = [(0, 4.0), (10, 3.0), (20, 1.0), (30, 3.0), (40, 1.0)]
    runs = [
        run_of("adamw", 1.0, seed=0, history=history),
        run_of("adamw", 4.0, seed=1, history=[(0, 4.0), (10, 2.5)]),
        run_of("sgdm", 1.0, history=[(0, 1.5), (10, 1.0)]),  # from the start
        run_of("adan", None, history=[(0, 4.0), (10, None), (15, math.nan), (20, 2.0)]),
    ]
    steps = steps_to_target(TEXT, runs, 2.0)
    assert steps == {"adamw": {0: 15.0, 1: math.inf}, "sgdm": {0: 0.0}, "adan": {0: 20.0}}


def test_accuracy_rises_to_its_target():
    run = run_of("adamw", 0.9, history=[(0, 0.1), (10, 0.5), (20, 0.9)], metric="accuracy")
    assert steps_to_target(DIGITS, [run], 0.6)["adamw"] == {0: pytest.approx(12.5)}


def test_the_target_is_the_worst_seed_so_that_all_of_its_seeds_reach_it():
    ends = (2.0, 2.2, 2.1)
    runs = [run_of("adamw", end, seed=s, history=[(0, 4.0), (100, end)]) for s, end in enumerate(ends)]
    assert default_target(TEXT, runs + [run_of("adamw", None, seed=3)]) == 2.2
    assert all(step <= 100 for step in steps_to_target(TEXT, runs, 2.2)["adamw"].values())
    accuracies = [run_of("adamw", end, seed=s, metric="accuracy") for s, end in enumerate((0.9, 0.8))]
    assert default_target(DIGITS, accuracies) == 0.8
    for none in ([], [run_of("adamw", None)], [run_of("sgdm", 1.0)]):
        with pytest.raises(ValueError, match="give a target"):
            default_target(TEXT, none)


def raced():
    "AdamW reaches 2.0 at 50 and 100, SGD-SaI at 25 with two of three seeds, Adan with one of two, SGDM with none."
    speeds = {"sgdm": [None], "adan": [50, None], "adamw": [50, 100], "sgd_sai": [25, 25, None]}
    runs = []
    for name, steps in speeds.items():
        for seed, step in enumerate(steps):
            history = [(0, 3.0), (step, 2.0)] if step else [(0, 3.0), (100, 2.5)]
            runs.append(run_of(name, history[-1][1], seed=seed, history=history))
    return runs


def test_the_table_of_targets_has_medians_ratios_and_times():
    costs = {"optimizers": {"adamw": {"ms": {"median": 20.0}}, "sgd_sai": {"ms": {"median": 30.0}}}}
    frame = target_frame(Experiment("x", TEXT, raced(), [], costs))
    assert list(frame.index) == ["SGD-SaI", "AdamW", "Adan", "SGDM"]  # of two that do not: more seeds that do
    assert frame.steps.tolist() == [25, 75, math.inf, math.inf]
    assert frame.reached.tolist() == [2, 2, 1, 0] and frame.seeds.tolist() == [3, 2, 2, 1]
    assert frame["x AdamW"].tolist() == [1 / 3, 1, math.inf, math.inf]
    assert frame.loc["SGD-SaI", ["first", "last"]].tolist() == [25, math.inf]
    assert frame.seconds.tolist()[:2] == [pytest.approx(0.75), pytest.approx(1.5)]
    assert frame["x AdamW's time"].tolist()[:2] == [pytest.approx(0.5), 1]
    assert frame.loc[["Adan", "SGDM"], ["seconds", "x AdamW's time"]].isna().all(axis=None)
    texts = target_texts(frame)
    assert texts.loc["SGD-SaI"].tolist() == ["2 of 3", "25", "0.33", "0.8", "0.50", "25", NOT_REACHED]
    assert texts.loc["SGDM"].tolist() == ["0 of 1", NOT_REACHED, NOT_REACHED, "", "", NOT_REACHED, NOT_REACHED]


def test_a_target_of_ones_own_needs_neither_adamw_nor_costs():
    runs = [run for run in raced() if run["optimizer"] != "adamw"]
    frame = target_frame(Experiment("x", TEXT, runs, [], None), target=2.5)
    assert frame.loc["SGD-SaI", "steps"] == 12.5 and frame.loc["SGDM", "steps"] == 100
    assert frame[["x AdamW", "seconds", "x AdamW's time"]].isna().all(axis=None)


# --- ranks ----------------------------------------------------------------------------------------------------------


def experiment(task, values, name="x", **more):
    "Optimizer -> value per seed (None: diverged) as an experiment."
    runs = [
        run_of(optimizer, value, seed=seed, metric=task.metric, **more)
        for optimizer, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    return Experiment(name, task, runs, [], None)


def test_ties_share_a_rank_and_what_diverged_is_last():
    up = experiment(DIGITS, {"adan": (0.5, None), "adamw": (0.9, 0.92, 0.91), "sgdm": (0.92, 0.91, 0.9)})
    down = experiment(TEXT, {"adan": (None, 1.0), "adamw": (1.5, 1.7), "sgdm": (1.2, 1.3), "po:Lion": (None, None)})
    both = experiment(TEXT, {"adan": (None, 1.0), "adamw": (1.5, 1.7), "po:Lion": (1.0, None)})
    frame = rank_frame([up, down], resamples=100)
    assert list(frame.columns[:3]) == ["digits-vit", "shakespeare-gpt", "mean rank"]
    assert frame.loc["SGDM"].tolist()[:3] == [1.0, 1.0, 1.0]  # 0.915 over the two seeds that all have
    assert frame.loc["AdamW"].tolist()[:3] == [2.0, 2.0, 2.0] and frame.loc["Adan"].tolist()[:3] == [3.0, 3.0, 3.0]
    assert list(frame.index) == ["SGDM", "AdamW", "Adan"]
    tied = rank_frame([both, both], resamples=100)
    assert tied["mean rank"].to_dict() == {"AdamW": 1.0, "Adan": 2.5, "Lion": 2.5}


def test_means_that_are_equal_but_for_rounding_are_tied():
    order, other = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    assert np.mean(order) != np.mean(other)
    each = experiment(DIGITS, {"adamw": order, "adan": other})
    assert rank_frame([each, each], resamples=100)["mean rank"].tolist() == [1.5, 1.5]


def test_an_interval_that_can_be_counted():
    """AdamW is first on one task and second on the other with every seed. Of four draws of two tasks one has the first
    task twice and one the second, so that the mean rank is 1, 1.5, 1.5 or 2."""
    first = experiment(DIGITS, {"adamw": (0.9, 0.91), "adan": (0.8, 0.81)})
    second = experiment(TEXT, {"adamw": (1.9, 1.91), "adan": (1.8, 1.81)})
    frame = rank_frame([first, second])
    assert frame.loc["AdamW", ["mean rank", "low", "high"]].tolist() == [1.5, 1, 2]
    always = rank_frame([first, first])
    assert always.loc["AdamW", ["low", "high"]].tolist() == [1, 1]


def test_seeds_are_drawn_for_all_optimizers_together():
    "Adan is ahead by the same step with every seed, so no draw of seeds turns the two round, however far seeds lie."
    paired = experiment(DIGITS, {"adamw": (0.1, 0.5, 0.9), "adan": (0.11, 0.51, 0.91)})
    frame = rank_frame([paired, paired])
    assert frame.loc["Adan", ["low", "high"]].tolist() == [1, 1]
    crossed = experiment(DIGITS, {"adamw": (0.1, 0.5, 0.9), "adan": (0.91, 0.51, 0.11)})
    assert rank_frame([crossed, crossed]).loc["Adan", ["low", "high"]].tolist() == [1, 2]


def test_the_interval_is_the_same_every_time_and_uses_its_resamples():
    rng = np.random.default_rng(1)
    values = {name: rng.normal(size=5).tolist() for name in ("adamw", "adan", "sgdm", "po:Lion")}
    both = [experiment(TEXT, values), experiment(DIGITS, values)]
    assert rank_frame(both, resamples=7).equals(rank_frame(both, resamples=7))
    assert not rank_frame(both, resamples=7)[["low", "high"]].equals(rank_frame(both)[["low", "high"]])


def test_ranks_need_the_same_optimizers_and_seeds_everywhere():
    one = experiment(DIGITS, {"adamw": (0.9, 0.91), "adan": (0.8, 0.81)}, "one")
    other = experiment(TEXT, {"adamw": (1.9, 1.91), "sgdm": (1.0, 1.1)}, "other")
    assert list(rank_frame([one, other], resamples=10).index) == ["AdamW"]
    with pytest.raises(ValueError, match="other has no runs of adan"):
        rank_frame([one, other], names=["adamw", "adan"])
    with pytest.raises(ValueError, match="at least two"):
        rank_frame([one])
    with pytest.raises(ValueError, match="no optimizer that all"):
        rank_frame([one, experiment(TEXT, {"sgdm": (1.0, 1.1)})])
    with pytest.raises(ValueError, match="single has 1 seeds"):
        rank_frame([one, experiment(TEXT, {"adamw": (1.0,)}, "single")])


def test_the_figure_of_ranks_has_the_best_on_top_and_colours_by_state():
    small = experiment(DIGITS, {"sgdm": (0.8, 0.81), "adamw": (0.9, 0.91)})
    runs = [run | {"state_bytes": 80 if run["optimizer"] == "adamw" else 40} for run in small.runs]
    frame = rank_frame([small._replace(runs=runs)] * 2)
    assert frame["one momentum"].to_dict() == {"AdamW": "no", "SGDM": "yes"}
    ax = plot_ranks(frame).axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["SGDM", "AdamW"]  # from below
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_color()) for line in points] == [
        (2, STATE_COLORS[True]),
        (1, STATE_COLORS[False]),
    ]
    assert is_frugal(run_of("sgdm", bytes_per_parameter=4.4)) and not is_frugal(run_of("sgdm", bytes_per_parameter=4.5))
    assert "2 tasks" in ax.get_xlabel()


# --- rates that transfer --------------------------------------------------------------------------------------------


def grid(optimizer, best, seed=0, rates=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), metric="val_loss"):
    "Runs whose loss is a parabola in log lr, lowest at `best`; rates are not evenly spaced."
    sign = -1 if metric == "accuracy" else 1
    return [run_of(optimizer, sign * (math.log(lr / best) ** 2 - 1), lr, seed=seed, metric=metric) for lr in rates]


@pytest.mark.parametrize("metric", ["val_loss", "accuracy"])
@pytest.mark.parametrize("best", [0.0004, 0.001, 0.0017, 0.008])
def test_the_lowest_point_of_a_parabola_is_found(best, metric):
    assert best_rate(DIGITS, grid("adamw", best, metric=metric), "adamw", metric) == pytest.approx(best)


def test_there_is_no_best_rate_at_an_edge():
    for best in (0.00001, 1.0):
        assert best_rate(TEXT, grid("adamw", best), "adamw") is None
    assert best_rate(TEXT, [], "adamw") is None
    assert best_rate(TEXT, [run_of("adamw", None, lr) for lr in (0.1, 0.2, 0.3)], "adamw") is None


def test_next_to_a_rate_that_diverged_the_grid_stands():
    runs = [run for run in grid("adamw", 0.002) if run["hyperparameters"]["lr"] < 0.01]
    assert best_rate(TEXT, runs, "adamw") is None  # 0.003, the last one
    assert best_rate(TEXT, runs + [run_of("adamw", None, 0.01)], "adamw") == 0.003


def test_the_best_decay_of_a_rate_counts_and_seeds_are_averaged():
    worse = [run_of("adamw", 9.0, lr, 0.1) for lr in (0.001, 0.003)]
    assert best_rate(TEXT, grid("adamw", 0.002) + worse, "adamw") == pytest.approx(0.002)
    both = grid("adamw", 0.001, seed=0) + grid("adamw", 0.004, seed=1)
    assert best_rate(TEXT, both, "adamw") == pytest.approx(0.002)  # the sum of two parabolas is lowest midway


def test_a_flat_valley_has_its_best_rate_in_the_middle_of_the_grid():
    runs = [run_of("adamw", loss, lr) for lr, loss in ((0.1, 2.0), (0.2, 1.0), (0.3, 1.0), (0.4, 1.0))]
    assert 0.2 < best_rate(TEXT, runs, "adamw") < 0.3


def widths(powers):
    "Grids at three widths; optimizer -> power of each seed."
    grids = {}
    for width in (24, 48, 96):
        runs = []
        for name, of_seeds in powers.items():
            for seed, power in enumerate(of_seeds):
                runs += grid(name, 0.01 * (width / 4) ** power, seed)
        grids[width] = TEXT, runs
    return grids


def test_the_power_of_the_width_comes_back():
    table = rate_table(widths({"adamw": [-0.5], "muon_sai:sign": [0.0]}))
    assert table.loc["AdamW", "power"] == pytest.approx(-0.5) and table.loc["Muon + sign", "power"] == pytest.approx(0)
    assert table.loc["AdamW", 24] == pytest.approx(0.01 / math.sqrt(6)) and table.seeds.tolist() == [1, 1]
    lengths = {steps: (TEXT, grid("adamw", 0.1 / steps)) for steps in (12, 24, 60)}
    assert rate_table(lengths).loc["AdamW", "power"] == pytest.approx(-1)


def test_the_range_of_a_power_is_that_of_its_seeds():
    row = rate_table(widths({"adamw": [-0.5, -0.3, -0.1]})).loc["AdamW"]
    assert row[["power", "low", "high", "seeds"]].tolist() == pytest.approx([-0.3, -0.5, -0.1, 3])


def test_a_size_without_a_best_rate_is_blank_and_so_is_a_power_of_one_size():
    grids = {24: (TEXT, grid("adamw", 0.002)), 48: (TEXT, grid("adamw", 1.0)), 96: (TEXT, grid("adamw", 0.001))}
    row = rate_table(grids).loc["AdamW"]
    assert math.isnan(row[48]) and row["power"] == pytest.approx(-0.5)  # halved at four times the width
    alone = rate_table({24: grids[24], 48: grids[48]}).loc["AdamW"]
    assert alone[["power", "low", "high"]].isna().all() and alone["seeds"] == 0


def test_a_seed_counts_when_it_has_a_best_rate_wherever_the_mean_has_one():
    ends = grid("adamw", 0.002) + grid("adamw", 0.002, seed=1)
    cut = grid("adamw", 0.001) + grid("adamw", 0.2, seed=1)  # the mean is lowest between them, seed 1 beyond the grid
    row = rate_table({24: (TEXT, ends), 48: (TEXT, cut), 96: (TEXT, ends)}).loc["AdamW"]
    assert row[48] == pytest.approx(math.sqrt(0.001 * 0.2)) and row["seeds"] == 1
    without = grid("adamw", 1.0)  # an edge, and no second seed
    row = rate_table({24: (TEXT, ends), 48: (TEXT, without), 96: (TEXT, ends)}).loc["AdamW"]
    assert math.isnan(row[48]) and row["seeds"] == 2


def test_a_size_is_a_positive_number():
    for wrong in ("24", 0, -1, math.nan):
        with pytest.raises(ValueError, match="positive number"):
            rate_table({wrong: (TEXT, grid("adamw", 0.001))})


def test_the_figure_of_transfer_draws_lines_and_powers_with_the_flattest_on_top():
    powers = {"adamw": [-0.5, -0.4], "muon_sai:sign": [0.0, 0.1], "sgdm": [0.3, 0.2]}
    left, right = plot_transfer(widths(powers), size="length").axes
    assert len(left.lines) == 3 and list(left.lines[0].get_xdata()) == [24, 48, 96]
    assert left.get_xscale() == left.get_yscale() == "log" and left.get_xlabel() == "length"
    assert [label.get_text() for label in right.get_yticklabels()] == ["AdamW", "SGDM", "Muon + sign"]  # from below
    dots = [line.get_xdata()[0] for line in right.lines if line.get_marker() == "o"]
    assert dots == pytest.approx([-0.45, 0.25, 0.05])
    chosen = plot_transfer(widths(powers), names=["sgdm"]).axes[0]
    assert [line.get_color() for line in chosen.lines] == [optimizer_style("sgdm")[1]]
