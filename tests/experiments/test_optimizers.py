"The registry: every entry has what each use of it needs, old names stay, and a user's own entry works everywhere."

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from sgd_sai.benchmarks.state_bytes import memory_table, real_state, state_size
from sgd_sai.benchmarks.step_time import build_for_benchmark, choose, measure_speed
from sgd_sai.experiments import optimizers
from sgd_sai.experiments.choices import TRAINING_NAMES, optimizer_help
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.optimizer_entries import ENTRIES
from sgd_sai.experiments.optimizer_entry import OptimizerEntry, build_from_named, entry_names, traffic_bytes
from sgd_sai.experiments.optimizers import (
    OPTIMIZERS,
    USES,
    build_optimizer,
    get_optimizer,
    optimizer_names,
    optimizer_style,
    register_optimizer,
)
from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.state_rules import measured_rule, rule_bytes, state_bytes
from sgd_sai.experiments.tasks.registry import get_task
from sgd_sai.experiments.train import train

SHAPES = {"embed.weight": (6, 4), "weight": (7, 3), "bias": (5,), "kernel": (4, 3, 3, 3)}

# The names that training, the table of state and the benchmark know; before there was one registry, each had a list.
RESTS = [f"muon_sai:{rest}" for rest in ("sign", "row_norm", "adams", "scion")]
TRAINING = "sgd_sai sgd_sai_sqrtn sgdm adamw adan adahessian muon_sai".split()
TRAINING += [*RESTS, "muon_adamw", "adam_mini", "authors", "adams"]
STATE = """
    sgd_sai sgd_sai_sqrtn sgd_sai_bf16 sgd_sai_int8 sgd_sai_momentum0 sgd_sai_kahan sgd_sai_stochastic adan adahessian
    sgd sgdm adam adamw amsgrad adamax nadam radam adagrad adadelta rmsprop rmsprop_momentum rmsprop_centered rprop asgd
    adafactor lbfgs muon_sai po:Lion po:AdamMini po:Prodigy
""".split()
BENCHMARK = """
    sgd-fused sgd-foreach sgd-loop sgd-compiled sgd-plain adamw-fused adamw-foreach adamw-loop sgd_sai sgd_sai-fused
    sgd_sai-foreach sgd_sai-loop sgd_sai-compiled sgd_sai-plain sgd_sai-bf16 sgd_sai-int8 authors po-sgdsai adam-mini
    prodigy adan adahessian muon_sai muon-adamw muon_sai-sgd_sai muon_sai-sign muon_sai-row_norm muon_sai-adams
""".split()
STYLES = {  # of the optimizers in results/
    "sgd_sai": ("SGD-SaI", "#C2410C", "-"),
    "sgd_sai_sqrtn": ("SGD-SaI, √n control", "#F59E0B", (0, (4, 2))),
    "sgdm": ("SGDM", "#6B7280", "-"),
    "adamw": ("AdamW", "#1D4ED8", "-"),
    "adan": ("Adan", "#0F766E", "-"),
    "adahessian": ("AdaHessian", "#7C3AED", "-"),
    "adam_mini": ("Adam-mini", "#60A5FA", "-"),
    "po:Lion": ("Lion", "#4D7C0F", "-"),
    "muon_adamw": ("Muon + AdamW", "#0E7490", (0, (4, 2))),
    "muon_sai": ("Muon + SGD-SaI", "#BE185D", "-"),
    "authors": ("SGD-SaI, authors' code", "#92400E", (0, (1, 1))),
    "scaled:none": ("SGDM, decoupled decay", "#6B7280", (0, (1, 1))),
    "scaled:rows": ("rows", "#A21CAF", "-"),
    "scaled:sqrt_fan_in": ("sqrt fan in", "#A21CAF", "-"),
}


@pytest.fixture
def registry(monkeypatch):
    "The registry, which is as before after the test."
    before = dict(OPTIMIZERS)
    yield OPTIMIZERS
    OPTIMIZERS.clear()
    OPTIMIZERS.update(before)


def entry_or_skip(name):
    "An entry whose class can be had here."
    entry = get_optimizer(name)
    try:
        assert entry.cls
    except (RuntimeError, ImportError) as e:
        pytest.skip(str(e))
    return entry


# --- entries --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_by_rule_is_that_of_the_real_optimizer(name):
    entry_or_skip(name)
    assert OPTIMIZERS[name].state, "an entry of the registry has a rule"
    assert state_size(name, SHAPES) == sum(map(state_bytes, real_state(name, SHAPES)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.trainable])
def test_every_entry_that_can_be_trained_makes_steps_on_a_model(name):
    entry_or_skip(name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    before = [p.detach().clone() for p in model.parameters()]
    opt = build_optimizer(name, model, {"lr": 1e-2})
    for _ in range(2):
        opt.zero_grad()
        loss = model(torch.randn(5, 6)).square().mean()
        loss.backward(create_graph=getattr(opt, "needs_graph", bool)())
        opt.step()
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert any(changed) and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if not entry.trainable])
def test_what_cannot_be_trained_is_refused(name):
    with pytest.raises(UsageError, match="cannot be trained here"):
        build_optimizer(name, nn.Linear(2, 2), {"lr": 1e-2})


@pytest.mark.parametrize("use", USES)
def test_labels_are_unique_in_every_list(use):
    entries = [get_optimizer(name) for name in optimizer_names(use)]
    labels = [entry.benchmark.label if use == "benchmark" else entry.label for entry in entries]
    assert len(set(labels)) == len(labels) > 0


def test_names_of_the_help_are_those_of_the_registry():
    "They are written down a second time, so that help does not wait for PyTorch."
    built_in = [entry.name for entry in ENTRIES if "training" in entry.uses]
    assert list(TRAINING_NAMES) == built_in and all(name in optimizer_help() for name in built_in)


def test_names_and_labels_of_entries_are_unique():
    names = [name for entry in OPTIMIZERS.values() for name in entry_names(entry)]
    assert len(set(names)) == len(names)
    labels = [entry.label for entry in OPTIMIZERS.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS[name].traffic])
def test_traffic_that_is_written_down_is_at_least_that_of_the_state(name):
    "What is derived for an entry without traffic is never more than an entry says, which may need arrays twice."
    entry = entry_or_skip(name)
    derived = OptimizerEntry("derived", entry.build, settings=entry.settings, state=entry.state)
    assert traffic_bytes(derived) <= traffic_bytes(entry)
    if name not in ("adam_mini", "po:Prodigy", "adahessian"):
        assert traffic_bytes(derived) == pytest.approx(traffic_bytes(entry), abs=0.01)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dict.fromkeys([*TRAINING, *STATE, *BENCHMARK]))
def test_every_name_of_the_old_registries_is_known(name):
    assert name in entry_names(get_optimizer(name))


def test_lists_have_the_names_of_the_old_registries():
    assert optimizer_names("training") == TRAINING
    assert {get_optimizer(name).name for name in STATE} <= set(optimizer_names("state"))
    assert set(optimizer_names("benchmark")) == set(BENCHMARK)
    with pytest.raises(UsageError, match="unknown use"):
        optimizer_names("trainin")


@pytest.mark.parametrize("name, style", STYLES.items())
def test_labels_and_colours_are_those_of_the_recorded_runs(name, style):
    assert optimizer_style(name) == style


def test_spare_colours_go_by_position():
    assert optimizer_style("po:Sophia", 0)[1] != optimizer_style("po:Muon", 1)[1]
    assert optimizer_style("an old name")[0] == "an old name"


def test_unknown_names_are_answered_with_the_nearest():
    for name, said in (("adamv", "did you mean adamw"), ("po:Lionn", "lion"), ("scaled:row", "did you mean rows")):
        with pytest.raises(UsageError, match=said):
            get_optimizer(name)


def test_variants_are_built_with_their_settings():
    [p] = [nn.Parameter(torch.ones(3, 2))]
    [opt] = build_from_named(get_optimizer("sgd_sai_int8"), [("p", p)])
    assert opt.defaults["state_dtype"] == torch.int8
    assert build_for_benchmark(get_optimizer("sgd_sai-foreach"), [p]).defaults["foreach"]
    sgd = build_for_benchmark(get_optimizer("sgd-fused"), [p]).defaults
    assert sgd["fused"] and sgd["momentum"] == 0.9 and sgd["weight_decay"] == 0
    assert build_optimizer("sgdm", nn.Linear(2, 2), {"lr": 0.1}).defaults["fused"]
    [plain] = build_from_named(get_optimizer("sgdm"), [("p", p)])
    assert plain.defaults["fused"] is None and plain.defaults["momentum"] == 0.9


def test_registry_needs_no_optional_package():
    code = "import sys, sgd_sai.experiments.optimizers; print([m for m in sys.argv[1:] if m in sys.modules])"
    command = [sys.executable, "-c", code, "pytorch_optimizer", "transformers", "matplotlib"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- a user's own ---------------------------------------------------------------------------------------------------

OWN = """
import torch
from sgd_sai.experiments.optimizers import OptimizerEntry, register_optimizer

class SignMomentum(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, momentum=0.9):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    p.sub_(m.sign(), alpha=group["lr"])

register_optimizer(OptimizerEntry("sign_momentum", SignMomentum))
"""


@pytest.fixture
def own(registry, tmp_path):
    "A file of a user's, imported."
    path = tmp_path / "my_optimizer.py"
    path.write_text(OWN)
    spec = importlib.util.spec_from_file_location("my_optimizer", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_own_optimizer_is_trained(own):
    task = get_task("digits-vit")
    data = task.load()
    spec = make_spec(task, data, "sign_momentum", steps=5, lr=1e-3)
    result = train(task, data, spec, device="cpu")
    assert result["status"] == "finished" and result["state_bytes"] == 4 * result["parameters"]


def test_own_optimizer_is_in_the_table_of_state(own):
    assert "sign_momentum" in optimizer_names("state")
    table = memory_table(["resnet18"], ["sign_momentum", "sgdm"])
    assert [row.state_bytes for row in table] == [table[0].weight_bytes] * 2 and "sign momentum" in repr(table)
    table.plot()


def test_own_optimizer_is_benchmarked(own):
    assert "sign_momentum" in choose()
    record = measure_speed([(30, 20)], choose(["sign_momentum"]), rounds=2)
    row = record["optimizers"]["sign_momentum"]
    assert row["label"] == "sign momentum" and row["bytes"] == 20 and not record["absent"]


def test_a_name_that_exists_is_refused_unless_it_is_replaced(registry):
    for name in ("sgd_sai", "sgd-fused", "po:AdamMini"):
        with pytest.raises(UsageError, match="already"):
            register_optimizer(OptimizerEntry(name, torch.optim.SGD))
    mine = OptimizerEntry("adamw", torch.optim.AdamW, "My AdamW")
    register_optimizer(mine, replace=True)
    assert get_optimizer("adamw") is mine and optimizers.optimizer_label("adamw") == "My AdamW"


def test_state_without_a_rule_is_found_by_steps():
    def of(cls, **settings):
        return measured_rule(lambda named: [cls([p for _, p in named], **settings)])

    adamw, sgd_sai = of(torch.optim.AdamW), of(get_optimizer("sgd_sai").cls)  # which reads values
    for name, rule in (("adamw", adamw), ("sgd_sai", sgd_sai)):
        assert rule_bytes(rule, SHAPES) == state_size(name, SHAPES)
    assert rule_bytes(adamw, {"weight": (2**20, 2**14)}) == 8 * 2**34 + 4  # 64 GiB that are never allocated
