"""Matrices of MuonSaI and of Muon with AdamW that two processes share.

What one of them lacks is an error in both that says what, instead of a crash in gloo; and a gradient that is not
finite in one shard is refused by both. Equal processes make the step of one process."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from common import on_two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from sgd_sai import MuonSaI
from sgd_sai.experiments.muon_adamw import MuonAdamW

SHAPES = {"up": (7, 6), "mid": (5, 6), "experts": (3, 4, 2), "bias": (7,)}


def tensors(seed):
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def sharded(t, mesh, placement):
    return DTensor.from_local(t, mesh, [Replicate()], run_check=False).redistribute(placements=[placement])


def params_on(mesh):
    "Parameters of which each process holds a part; without a mesh whole ones."
    if mesh is None:
        return {name: nn.Parameter(t) for name, t in tensors(0).items()}
    return {name: nn.Parameter(sharded(t, mesh, Shard(0))) for name, t in tensors(0).items()}


def give(params, seed, placement=None):
    for name, g in tensors(seed).items():
        if name in params:
            p = params[name]
            p.grad = g if placement is None else sharded(g, p.device_mesh, placement)


def built(params, cls=MuonSaI):
    def group(names, **marks):
        return {"params": [(name, params[name]) for name in names if name in params], **marks}

    groups = [
        group(["up", "mid"], muon=True),
        group(["experts"], muon=True, stacked=True),
        group(["bias"], muon=False),
    ]
    return cls([g for g in groups if g["params"]], lr=0.05)


def whole(params):
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in params.items()}


def three_steps(mesh, placement=None, cls=MuonSaI):
    params = params_on(mesh)
    opt = built(params, cls)
    for seed in range(1, 4):
        give(params, seed, placement)
        opt.step()
    return whole(params)


def lacks_a_gradient(rank, params):
    if rank:
        params["mid"].grad = None


def lacks_a_stack(rank, params):
    if rank:
        del params["experts"]


def lacks_all_gradients(rank, params):
    for p in params.values() if rank else ():
        p.grad = None


def not_finite(rank, params):
    if rank:
        params["up"].grad.to_local()[0, 0] = math.nan


CASES = {
    lacks_a_gradient: "mid: a gradient on rank 0, but no gradient on rank 1",
    lacks_a_stack: "rank 1 lacks experts",
    lacks_all_gradients: "up, mid, experts: a gradient on rank 0, but no gradient on rank 1",
    not_finite: "the gradient of up is not finite",
}
TRIED = [(case, steps) for case in CASES for steps in (0, 1) if case is not lacks_a_stack or not steps]


def refused(rank, mesh, case, steps_before):
    "What a step says, and whether all is as it was."
    params = params_on(mesh)
    if case is lacks_a_stack:
        case(rank, params)
    opt = built(params)
    for seed in range(steps_before):
        give(params, seed + 1, Shard(0))
        opt.step()
    give(params, 9, Shard(0))
    if case is not lacks_a_stack:
        case(rank, params)
    before = {name: p.to_local().clone() for name, p in params.items()}
    momenta = {name: opt.state[p].get("momentum_buffer") for name, p in params.items() if p in opt.state}
    momenta = {name: m.to_local().clone() for name, m in momenta.items()}
    said = "no error"
    try:
        opt.step()
    except RuntimeError as e:
        said = str(e)
    same = all(torch.equal(p.to_local(), before[name]) for name, p in params.items())
    kept = {name: opt.state[p]["momentum_buffer"].to_local() for name, p in params.items() if opt.state.get(p)}
    return said, same and all(
        torch.equal(kept[name], m) for name, m in momenta.items()
    ) and kept.keys() == momenta.keys()


def of_rank(rank, store, out):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {
        "alone": three_steps(None),
        "sharded": three_steps(mesh, Shard(0)),
        "gradients elsewhere": three_steps(mesh, Replicate()),
        "AdamW alone": three_steps(None, cls=MuonAdamW),
        "AdamW sharded": three_steps(mesh, Shard(0), MuonAdamW),
    }
    for case, steps_before in TRIED:
        found[case.__name__, steps_before] = refused(rank, mesh, case, steps_before)
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return on_two_processes(of_rank, tmp_path_factory.mktemp("muon"))


@pytest.mark.parametrize("case, steps_before", TRIED, ids=lambda x: getattr(x, "__name__", x))
def test_what_one_process_lacks_is_an_error_in_both_that_says_what(two_processes, case, steps_before):
    for found in two_processes:
        said, unchanged = found[case.__name__, steps_before]
        assert CASES[case] in said and unchanged


@pytest.mark.parametrize("way", ["sharded", "gradients elsewhere"])
def test_two_processes_make_the_steps_of_one(two_processes, way):
    for found in two_processes:
        torch.testing.assert_close(found[way], found["alone"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["AdamW sharded"], found["AdamW alone"], rtol=1e-5, atol=1e-6)
    start = tensors(0)
    assert all((t - start[name]).abs().max() > 1e-3 for name, t in two_processes[0]["alone"].items())
