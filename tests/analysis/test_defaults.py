"The sweeps called default have the defaults of the classes, and a default is compared on equal seeds."

import inspect
import math
from pathlib import Path

import pytest
import torch

from sgd_sai import MuonSaI
from sgd_sai.analysis.defaults import DefaultRuns, default_frame, default_gap
from sgd_sai.analysis.rankings import Experiment
from sgd_sai.experiments.sweep import read_sweep
from sgd_sai.experiments.tasks.registry import get_task
from sgd_sai.rest_rules import REST_BY_ROLE

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*/default.yaml"))


def default_of(cls, name):
    return inspect.signature(cls).parameters[name].default


def test_there_is_one_for_each_task_of_the_report():
    assert len(SWEEPS) == 8


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_a_default_sweep_has_the_defaults_of_the_classes(path):
    sweep = read_sweep(path)
    ours = {key: value for key, (value,) in sweep.grid["muon_sai:row_norm"].items()}
    lr, rest = default_of(MuonSaI, "lr"), default_of(MuonSaI, "rest")
    assert rest == "row_norm"
    for role in ("embedding", "head", "vector"):
        assert ours["rest_lr"] == pytest.approx(lr * REST_BY_ROLE[rest][role]["lr_factor"], rel=1e-12)
    assert ours["lr"] == lr and ours["weight_decay"] == default_of(MuonSaI, "weight_decay") and len(ours) == 3
    theirs = {key: value for key, (value,) in sweep.grid["adamw"].items()}
    assert theirs == {key: default_of(torch.optim.AdamW, key) for key in ("lr", "weight_decay")}


def runs(optimizer, losses, seeds):
    ends = [dict(seed=seed, final={"val_loss": loss}) for seed, loss in zip(seeds, losses, strict=True)]
    return [dict(optimizer=optimizer, status="finished", **end) for end in ends]


def experiment(*parts):
    return Experiment("task/name", get_task("kjv-gpt2"), [run for part in parts for run in part], [], None)


def test_a_lower_loss_is_better_and_only_common_seeds_count():
    default = experiment(runs("muon_sai", [1.0, 1.1, 9.0], [0, 1, 7]))
    tuned = experiment(runs("muon_sai", [0.9, 1.0], [0, 1]), runs("adamw", [1.5, 1.6, 0.0], [0, 1, 2]))
    gaps = DefaultRuns(default, tuned)
    assert default_gap(gaps, "muon_sai", "muon_sai").mean == pytest.approx(-0.1)
    assert default_gap(gaps, "muon_sai", "adamw")[::2] == (pytest.approx(0.5), 2)
    frame = default_frame([gaps], "muon_sai", ["adamw"])
    assert [text.split()[-1] for text in frame.loc["kjv-gpt2"][1:]] == ["worse", "better"]


def test_one_common_seed_leaves_the_comparison_open():
    default = experiment(runs("muon_sai", [1.0], [0]))
    gap = default_gap(DefaultRuns(default, experiment(runs("adamw", [2.0], [0]))), "muon_sai", "adamw")
    assert gap.mean == 1.0 and math.isnan(gap.std)
