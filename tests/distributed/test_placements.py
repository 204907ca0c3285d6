"""Gradients and saved states that are placed otherwise than their parameters, and statistics of whole tensors.

Everything is measured in one pair of processes and compared with the same in one process, on whole tensors.
"""

import copy
import math
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
from common import on_two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from sgd_sai import Adan, MuonSaI, SGDSaI
from sgd_sai.gsnr import gsnr, gsnr_values
from sgd_sai.internals.sharding import to_local
from sgd_sai.scale_rules import _largest_entries, measure_scales

SHAPES = {"up": (5, 6), "down": (7, 5), "gain": (7,)}
STEPS = 3
OPTIMIZERS = {
    "SGDSaI": lambda params: SGDSaI(params.items()),
    "Adan": lambda params: Adan(params.items(), lr=1e-2),
    "MuonSaI": lambda params: MuonSaI(
        [{"params": [("up", params["up"])], "muon": True}, {"params": [*params.items()][1:]}]
    ),
}
ROWS, COLUMNS, COPIES, SUMMANDS = "rows", "columns", "copies", "summands"
GRADIENTS = [(ROWS, SUMMANDS), (ROWS, COLUMNS), (ROWS, COPIES), (COLUMNS, ROWS), (COPIES, SUMMANDS), (COPIES, ROWS)]
STATES = [("whole", ROWS), (ROWS, "whole"), (COLUMNS, ROWS), (COPIES, COLUMNS), (ROWS, COPIES)]


def numbers(seed):
    "A tensor for each name, the same in every process."
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def placed(whole, how, mesh):
    "The whole tensor as a DTensor that is placed as `how` says; columns of a vector are its rows."
    if how == "whole":
        return whole.clone()
    if how == SUMMANDS:
        return DTensor.from_local(whole * (0.25 + 0.5 * mesh.get_local_rank()), mesh, [Partial()], run_check=False)
    replicated = DTensor.from_local(whole.clone(), mesh, [Replicate()], run_check=False)
    shard = {ROWS: Shard(0), COLUMNS: Shard(min(1, whole.ndim - 1)), COPIES: Replicate()}[how]
    return replicated.redistribute(placements=[shard])


def whole_of(t):
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def parameters(how, mesh, values=None):
    return {name: nn.Parameter(placed(value, how, mesh)) for name, value in (values or numbers(0)).items()}


def step(opt, params, how, mesh, seed, defaults=nullcontext):
    for name, grad in numbers(seed).items():
        params[name].grad = placed(grad, how, mesh)
    with defaults():
        opt.step()


def trained(name, how, how_gradient, mesh, defaults=nullcontext):
    "The parameters after some steps, whole."
    params = parameters(how, mesh)
    with defaults():
        opt = OPTIMIZERS[name](params)
    for seed in range(1, STEPS + 1):
        step(opt, params, how_gradient, mesh, seed, defaults)
    return {name: whole_of(p) for name, p in params.items()}


def resumed(name, saved, here, mesh, defaults=nullcontext):
    "The same, with a state that is saved after the first step in one placement and loaded in another."
    params = parameters(saved, mesh)
    opt = OPTIMIZERS[name](params)
    step(opt, params, saved, mesh, 1)
    file = copy.deepcopy(opt.state_dict())
    params = parameters(here, mesh, {name: whole_of(p) for name, p in params.items()})
    with defaults():
        opt = OPTIMIZERS[name](params)
        opt.load_state_dict(file)
    for seed in range(2, STEPS + 1):
        step(opt, params, here, mesh, seed, defaults)
    return {name: whole_of(p) for name, p in params.items()}


# gradients of which a shard looks different from the whole: two entries, one in each process; a process without any
WHOLES = {
    "one entry": torch.tensor([2.0]),
    "one entry, a matrix": torch.tensor([[3.0]]),
    "two entries": torch.tensor([1.0, 3.0]),
    "constant": torch.full((3, 2), 0.5),
    "constant and one": torch.tensor([1.0, 1.0, 1.0, 1.5]),
    "one half far larger": torch.cat([torch.linspace(1, 2, 50), 1e-4 * torch.linspace(-1, 2, 50)]).view(10, 10),
    "uneven": torch.linspace(-1, 2, 33).view(11, 3),
    "tiny": 1e-30 * torch.linspace(-1, 2, 33).view(11, 3),
    "huge": 1e30 * torch.linspace(-1, 2, 33).view(11, 3),
    "one half zeros": torch.cat([torch.zeros(20), torch.linspace(1, 2, 20)]),
    "one half tiny": torch.cat([1e-30 * torch.ones(20), 1e-25 * torch.linspace(1, 2, 20)]),
    "zeros": torch.zeros(4),
    "empty": torch.zeros(0),
    "not finite": torch.tensor([1.0, 2.0, 3.0, float("inf")]),
}
EPS = (1e-8, 0.1, 10.0)


def statistics(grads):
    "Of these gradients, whole or not: what every reader makes of them, one by one and together."
    found = {("largest", None): _largest_entries(grads)}
    for eps in EPS:
        found["gsnr", eps] = [gsnr(grad, eps).item() for grad in grads]
        found["gsnr_values", eps] = gsnr_values(grads, eps)
        found["measure_scales", eps] = measure_scales(grads, eps=eps, max_ratio=None)
        found["held", eps] = measure_scales(grads, eps=eps, max_ratio=2.0)
    found["own rule", None] = measure_scales(grads, scale=lambda grad: grad.double().square().sum())
    return found


def by_hand(whole, eps, limit=math.inf, empty=1.0):
    "G by its formula, in double precision."
    g, n = whole.double(), whole.numel()
    norm = g.norm().item()
    if n == 0 or norm == 0 or not math.isfinite(norm):
        return empty if n == 0 else 0.0 if norm == 0 else math.nan
    G = norm / (g.std().item() + min(eps, 1e-3 * norm / math.sqrt(n))) if n > 1 else 1.0
    return min(G, limit * math.sqrt(n))


def under_way(mesh):
    "Local parts of a DTensor whose communication is under way: their types, and whether the numbers are there."
    wholes = [torch.arange(60.0).view(10, 6) * (1 + mesh.get_local_rank()) for _ in range(20)]
    summed = [
        DTensor.from_local(whole, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(0)], async_op=True)
        for whole in wholes
    ]
    local = [to_local(t) for t in summed]
    rows = slice(0, 5) if mesh.get_local_rank() == 0 else slice(5, 10)
    right = all(torch.equal(part, 3 * torch.arange(60.0).view(10, 6)[rows]) for part in local)
    return {type(part).__name__ for part in local}, right


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {"device meta": lambda: torch.device("meta"), "dtype float64": float64_by_default}


def outcome(run, *args):
    "What it returns, or its error."
    try:
        return run(*args)
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as e:
        return f"{type(e).__name__}: {e}"


def two_that_share(rank, store, out):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name in OPTIMIZERS:
        for case in GRADIENTS:
            found[name, "gradient", case] = outcome(trained, name, *case, mesh)
        for case in STATES:
            found[name, "state", case] = outcome(resumed, name, *case, mesh)
        for label, defaults in DEFAULTS.items():
            found[name, label, "gradient"] = outcome(trained, name, ROWS, ROWS, mesh, defaults)
            found[name, label, "state"] = outcome(resumed, name, "whole", ROWS, mesh, defaults)
    for label, defaults in DEFAULTS.items():
        grads = [placed(whole, ROWS, mesh) for whole in WHOLES.values()]
        with defaults():
            found["statistics", label] = outcome(statistics, grads)
    found["statistics"] = statistics([placed(whole, ROWS, mesh) for whole in WHOLES.values()])
    found["under way"] = under_way(mesh)
    summands = placed(WHOLES["uneven"], SUMMANDS, mesh)
    found["summands"] = [outcome(read, summands) for read in (gsnr, lambda t: gsnr_values([t]))]
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return on_two_processes(two_that_share, tmp_path_factory.mktemp("placements"))


each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def check_as_in_one_process(found, name):
    alone = trained(name, "whole", "whole", None)
    assert not isinstance(found, str), found
    for key, value in alone.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
        assert (value - numbers(0)[key]).abs().max() > 1e-3


@each_optimizer
@pytest.mark.parametrize("case", GRADIENTS, ids="parameter as {0[0]}, gradient as {0[1]}".format)
def test_gradients_placed_otherwise_than_their_parameters(two_processes, name, case):
    for found in two_processes:
        check_as_in_one_process(found[name, "gradient", case], name)


@each_optimizer
@pytest.mark.parametrize("case", STATES, ids="{0[0]} to {0[1]}".format)
def test_states_loaded_into_another_placement(two_processes, name, case):
    for found in two_processes:
        check_as_in_one_process(found[name, "state", case], name)


@each_optimizer
@pytest.mark.parametrize("label", DEFAULTS)
@pytest.mark.parametrize("kind", ["gradient", "state"])
def test_sharded_steps_under_other_defaults(two_processes, name, label, kind):
    for found in two_processes:
        check_as_in_one_process(found[name, label, kind], name)


@pytest.mark.parametrize("label", DEFAULTS)
def test_statistics_of_shards_under_other_defaults(two_processes, label):
    for found in two_processes:
        expected, other = found["statistics"], found["statistics", label]
        assert not isinstance(other, str), other
        for key in expected:
            assert other[key] == pytest.approx(expected[key], rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("reader", ["gsnr", "gsnr_values", "measure_scales", "held"])
def test_statistics_of_shards_are_those_of_the_whole_tensor(two_processes, reader, eps):
    more = {"held": dict(limit=2.0), "gsnr": dict(empty=0.0), "gsnr_values": dict(empty=0.0)}.get(reader, {})
    exact = [by_hand(whole, eps, **more) for whole in WHOLES.values()]
    for found in two_processes:
        for label, value, expected in zip(WHOLES, found["statistics"][reader, eps], exact, strict=True):
            if reader in ("gsnr", "gsnr_values") and label in ("tiny", "huge", "one half tiny"):
                continue  # their squares leave the range of float32; measure_scales divides them first
            assert value == pytest.approx(expected, rel=1e-6, nan_ok=True), label
    assert two_processes[0]["statistics"][reader, eps] == pytest.approx(
        two_processes[1]["statistics"][reader, eps], rel=0, abs=0, nan_ok=True
    )


def test_what_a_rule_returns_is_that_of_the_whole_tensor(two_processes):
    squares = [whole.double().square().sum() for whole in WHOLES.values()]
    for found in two_processes:
        for label, value, expected in zip(WHOLES, found["statistics"]["own rule", None], squares, strict=True):
            if label != "not finite":
                assert value == pytest.approx(float(expected), rel=1e-6), label


def test_one_entry_in_all_processes_has_a_scale_of_one(two_processes):
    for found in two_processes:
        for eps in EPS:
            scales = dict(zip(WHOLES, found["statistics"]["measure_scales", eps], strict=True))
            assert scales["one entry"] == scales["one entry, a matrix"] == scales["empty"] == 1.0
            assert scales["zeros"] == 0.0 and math.isnan(scales["not finite"])


def test_the_largest_entry_is_that_of_all_processes(two_processes):
    expected = [whole.abs().max().item() if whole.numel() else 0.0 for whole in WHOLES.values()]
    for found in two_processes:
        assert found["statistics"]["largest", None] == expected


def test_shards_that_are_under_way_have_arrived_when_they_are_used(two_processes):
    for types, right in (found["under way"] for found in two_processes):
        assert types == {"Tensor"} and right


def test_summands_are_refused_instead_of_measured(two_processes):
    for found in two_processes:
        assert all("a DTensor of summands (Partial) has to be added up first" in said for said in found["summands"])
