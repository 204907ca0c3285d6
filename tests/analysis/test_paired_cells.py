"Runs that differ in what steps the rest of Muon are paired by everything else."

import pytest

from sgd_sai.analysis.paired_cells import cell_pairs, pair_frame, plot_cell_pairs
from sgd_sai.analysis.rankings import Experiment
from sgd_sai.experiments.tasks.registry import get_task

SIGN, ADAMW = "muon_sai:sign", "muon_adamw"


def run(optimizer, lr, value, weight_decay=0.1, seed=10, steps=50, status="finished"):
    given = dict(lr=lr, weight_decay=weight_decay)
    final = {"accuracy": value, "val_loss": value}
    return dict(optimizer=optimizer, hyperparameters=given, seed=seed, steps=steps, status=status, final=final)


RUNS = [
    run(SIGN, 0.2, 0.5),
    run(ADAMW, 0.1, 0.8),
    run(SIGN, 0.1, 0.7),
    run(ADAMW, 0.2, 0.3),
    run(SIGN, 0.3, 0.9),  # has no partner: every other run of AdamW differs in one thing
    run(ADAMW, 0.3, 0.9, weight_decay=0.2),
    run(ADAMW, 0.3, 0.9, seed=11),
    run(ADAMW, 0.3, 0.9, steps=51),
    run(ADAMW, 0.3, 0.9, status="diverged"),
    run("adamw", 0.3, 0.9),
]


@pytest.mark.parametrize("name, sign", [("digits-vit", 1), ("shakespeare-gpt", -1)])
def test_a_pair_differs_in_the_optimizer_alone(name, sign):
    pairs = cell_pairs(get_task(name), RUNS, SIGN, ADAMW)
    assert [(pair.lr, pair.first, pair.second) for pair in pairs] == [(0.1, 0.7, 0.8), (0.2, 0.5, 0.3)]
    assert [pair.gap for pair in pairs] == pytest.approx([-0.1 * sign, 0.2 * sign])


def test_the_table_has_the_median_in_the_unit_of_the_task_and_counts_the_better_ones():
    more = [*RUNS, run(SIGN, 0.4, 0.6), run(ADAMW, 0.4, 0.55)]
    found = pair_frame([Experiment("x", get_task("digits-vit"), [], [more, []], None)], [SIGN], ADAMW)
    assert found.loc["digits-vit"].to_dict() == {"unit": "points", "Muon + sign": "+5.00 (2 of 3)"}


def test_the_figure_puts_the_second_below_and_what_does_not_fit_at_the_edge():
    both = [run(SIGN, 0.1, 0.70), run(ADAMW, 0.1, 0.68), run(SIGN, 0.2, 0.65), run(ADAMW, 0.2, 0.10)]
    digits = Experiment("x", get_task("digits-vit"), [], [both], None)
    text = Experiment("y", get_task("shakespeare-gpt"), [], [both], None)
    first, second = plot_cell_pairs([digits, text], [SIGN]).axes
    x, y = first.lines[0].get_data()
    assert list(x) == pytest.approx([68, 60]) and list(y) == pytest.approx([70, 65])
    x, y = second.lines[0].get_data()
    assert list(x) == pytest.approx([0.6, 0.1]) and list(y) == pytest.approx([0.6, 0.6])
    assert second.get_xlim()[0] > second.get_xlim()[1]  # lower losses are on the right and above
    low, high = first.get_xlim()
    assert first.lines[-1].get_data()[0] == pytest.approx([low, high]) == first.lines[-1].get_data()[1]


def test_an_optimizer_that_the_search_lacks_has_an_empty_cell_and_no_marks():
    both = [run(SIGN, 0.1, 0.70), run(ADAMW, 0.1, 0.68)]
    digits = [Experiment("x", get_task("digits-vit"), [], [both], None)]
    found = pair_frame(digits, [SIGN, "muon_sai:adams"])
    assert found.loc["digits-vit", "Muon + AdamS"] == "" and found.loc["digits-vit", "Muon + sign"] == "+2.00 (1 of 1)"
    (panel,) = plot_cell_pairs(digits, [SIGN, "muon_sai:adams"]).axes
    assert [line.get_label() for line in panel.lines if len(line.get_xdata()) == 1] == ["sign"]
