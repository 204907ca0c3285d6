"What differs between two optimizers besides the optimizer is found, and nothing is left unexplained."

from pathlib import Path

import pytest

from sgd_sai.analysis import audit as page
from sgd_sai.analysis.audit import (
    EXPLAINED,
    audit,
    audit_all,
    audit_frame,
    decay_per_step,
    muon_parts,
    reason_frame,
    rest_rate,
    untrained,
)
from sgd_sai.analysis.rankings import Experiment
from sgd_sai.experiments.tasks.registry import get_task

HIDDEN, OTHER = "hidden matrices", "other matrices"
ROOT = Path(__file__).resolve().parents[2]


def made(optimizer, seeds=(0, 1), steps=100, clip=1.0, **hyperparameters):
    "Runs of one optimizer at one setting, as far as an audit reads them."
    schedule = dict(steps=steps, batch_size=8, warmup=10, clip=clip, precision="no")
    return [dict(optimizer=optimizer, seed=seed, hyperparameters=hyperparameters, **schedule) for seed in seeds]


def experiment(runs, *stages):
    return Experiment("task/name", get_task("digits-vit"), runs, list(stages), None)


@pytest.mark.parametrize(
    "optimizer, hyperparameters, decays",
    [
        ("adamw", dict(lr=0.01, weight_decay=0.1), {"matrices": 1e-3}),
        ("adamw", dict(lr=0.01), {"matrices": 1e-4}),  # PyTorch's default is 0.01
        ("sgdm", dict(lr=0.1, weight_decay=1e-3), {"matrices": 1e-3}),  # momentum 0.9 gathers it
        ("sgdm", dict(lr=0.1, weight_decay=1e-3, momentum=0.5), {"matrices": 2e-4}),
        ("sgd_sai", dict(lr=0.1, weight_decay=1e-3), {"matrices": 1e-4}),
        ("po:Lion", dict(lr=0.1), {"matrices": 0.0}),
        ("muon_adamw", dict(lr=0.02, weight_decay=0.1), {HIDDEN: 2e-3, OTHER: 3e-4}),
        ("muon_adamw", dict(lr=0.02, adamw_lr=0.1, weight_decay=0.1), {HIDDEN: 0.002, OTHER: 0.01}),
        ("muon_sai", dict(lr=0.02, weight_decay=0.1), {HIDDEN: 2e-3, OTHER: 3e-3}),
        ("muon_sai:sign", dict(lr=0.02, weight_decay=0.1), {HIDDEN: 2e-3, OTHER: 1e-4}),
        ("muon_sai:row_norm", dict(lr=0.02, rest_lr=0.5, weight_decay=0.1), {HIDDEN: 2e-3, OTHER: 0.05}),
    ],
)  # fmt: skip
def test_the_decay_of_a_step(optimizer, hyperparameters, decays):
    (run,) = made(optimizer, seeds=[0], **hyperparameters)
    assert decay_per_step(run) == pytest.approx(decays)


def test_the_rates_of_the_rest_are_those_of_the_optimizers():
    "What the page says of a rest without a rate of its own is what the class does."
    from sgd_sai.experiments.optimizers import build_optimizer

    task = get_task("digits-vit")
    for name in ("muon_sai", "muon_sai:sign", "muon_sai:row_norm", "muon_sai:adams", "muon_sai:scion"):
        opt = build_optimizer(name, task.build({}), {"lr": 0.02})
        (rate,) = {g["lr"] * g["lr_factor"] for g in opt.param_groups if g["role"] == "embedding"}
        assert rate == pytest.approx(rest_rate(made(name, lr=0.02)[0])), name
    opt = build_optimizer("muon_adamw", task.build({}), {"lr": 0.02})
    (rate,) = {g["lr"] * g.get("lr_factor", 1) for g in opt.param_groups if not g.get("muon")}
    assert rate == pytest.approx(rest_rate(made("muon_adamw", lr=0.02)[0]))


@pytest.mark.parametrize(
    "change, found",
    [
        (dict(), False),
        (dict(rest_lr=0.5), False),  # that is what is compared
        (dict(weight_decay=0.01), True),  # the comparison that was wrong
        (dict(lr=0.03), True),
        (dict(lr=0.1, weight_decay=0.02), True),  # the same decay at another rate
        (dict(momentum=0.9), True),
        (dict(ns_steps=6), True),
        (dict(nesterov=False), True),
        (dict(adjust_lr="match_rms_adamw"), True),
    ],
)
def test_optimizers_that_share_muon_have_to_be_equal_there(change, found):
    runs = made("muon_adamw", lr=0.02, weight_decay=0.1) + made(
        "muon_sai", **{"lr": 0.02, "weight_decay": 0.1} | change
    )
    runs += made("adamw", lr=0.003, weight_decay=0.5)  # has no part of Muon's
    assert ("shared part" in audit(experiment(runs)).found) == found


def test_scions_step_is_another_one():
    assert list(muon_parts(made("muon_sai:scion", lr=0.1) + made("muon_sai", lr=0.1))) == ["muon_sai"]


def test_a_search_that_drew_the_same_matrices_shares_them():
    "Each may end at another cell of its own."
    cells = [dict(lr=0.02, weight_decay=0.1), dict(lr=0.04, weight_decay=0.05), dict(lr=0.08, weight_decay=0.02)]
    search = [run for name in ("muon_sai", "muon_adamw") for cell in cells for run in made(name, **cell)]
    runs = made("muon_sai", **cells[0]) + made("muon_adamw", **cells[1])
    assert "shared part" in audit(experiment(runs, search)).found
    assert "shared part" not in audit(experiment(runs, search), drawn=True).found
    other = search[:-2] + made("muon_adamw", lr=0.08, weight_decay=0.03)
    assert "shared part" in audit(experiment(runs, other), drawn=True).found


def test_how_settings_were_chosen_is_found():
    grid = [run for lr in (0.001, 0.01, 0.1) for run in made("adamw", steps=50, seeds=[0], lr=lr, weight_decay=0.1)]
    grid += made("sgdm", steps=50, seeds=[0], lr=0.1, weight_decay=0.1)
    chosen = made("adamw", lr=0.001, weight_decay=0.1) + made("sgdm", lr=0.1, weight_decay=0.1)
    found = audit(experiment(chosen, grid)).found
    assert found["cells"] == "1 to 3" and found["decay not tuned"] == "1 of 2 optimizers"
    assert found["one seed"] and found["short"] == "chosen after 50 of 100 steps"
    assert "AdamW (low)" in found["edge"]
    again = made("adamw", lr=0.001, weight_decay=0.1) + made("sgdm", lr=0.1, weight_decay=0.1)
    assert not {"one seed", "short"} & set(audit(experiment(chosen, grid, again)).found)  # the last choice counts


@pytest.mark.parametrize("wd, found", [(0.1, False), (0.3, False), (0.31, True), (0.03, True), (0.0, True)])
def test_decays_that_nobody_tuned_have_to_be_near_each_other(wd, found):
    "Within a factor of three. The median of each optimizer counts, so that one cell of a grid does not."
    runs = [run for given in (0.1, 0.1, 9.0) for run in made("adamw", lr=0.01, weight_decay=given)]
    runs += made("sgd_sai", lr=0.01, weight_decay=wd)
    assert ("decay differs" in audit(experiment(runs)).found) == found
    assert "decay differs" not in audit(experiment(runs, runs), drawn=True).found


@pytest.mark.parametrize("change", [dict(steps=99), dict(clip=None)])
def test_another_schedule_is_found(change):
    runs = made("adamw", lr=0.1, weight_decay=0.0) + made("sgdm", lr=0.1, weight_decay=0.0)
    assert audit(experiment(runs)).found == {}
    assert "schedule" in audit(experiment(runs + made("adan", lr=0.1, weight_decay=0.0, **change))).found


def test_runs_on_a_processor_and_on_a_gpu_are_not_compared_unseen():
    runs = made("adamw", lr=0.1, weight_decay=0.0) + made("sgdm", lr=0.1, weight_decay=0.0)
    for run, device in zip(runs, ("cpu: x86_64", "cpu: arm", "cpu: x86_64", "cuda: NVIDIA H200"), strict=True):
        run["environment"] = {"device": device}
    assert audit(experiment(runs)).found == {"device": "cpu and cuda"}
    assert audit(experiment(runs[:3])).found == {}
    chosen = made("adamw", lr=0.1, weight_decay=0.0) + made("sgdm", lr=0.1, weight_decay=0.0)
    assert audit(experiment(chosen, runs, chosen)).found["device"] == "cpu and cuda"  # in the search
    assert "device" not in audit(experiment(chosen, runs[:3], chosen)).found


def test_nothing_on_the_site_is_unexplained_and_no_explanation_is_stale():
    audits, used = audit_all(ROOT), set()
    for each in audits:
        for finding in each.found:
            key = next(
                (k for k in EXPLAINED if k[1] == finding and page.fnmatch(each.name, k[0])), (each.name, finding)
            )
            assert key in EXPLAINED, f"{each.name}: {finding} is not explained"
            used.add(key)
    assert used == set(EXPLAINED)
    waiting = {  # none of the others may lose its runs without a word
        *("digits-vit/example", "shakespeare-gpt/scalings", "shakespeare-gpt-large/gpu", "python-gpt2/gpu"),
    }
    assert set(untrained(ROOT)) == waiting
    assert len(audit_frame(audits)) == len(audits) > 10
    reasons = reason_frame(audits)
    assert sum(len(where.split("; ")) for where in reasons["where"]) == sum(len(each.found) for each in audits)
    assert "shakespeare-gpt/rest (1 to 4)" in set(reasons.loc["cells", "where"])
    assert audit_frame(audits).loc["shakespeare-gpt/rest", "differs besides"] == "shared part, cells"
    with pytest.raises(KeyError, match="new/sweep: shared part is not explained"):
        page.explanation("new/sweep", "shared part")
