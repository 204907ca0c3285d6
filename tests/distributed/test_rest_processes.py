"""The rules for the rest on two processes: equal to one, whatever the placements; one message for the rows of a step;
what one process lacks is an error in both."""

import warnings

import pytest
import torch
import torch.distributed as dist
from common import on_two_processes
from rest_optimizer import RULES, RestOptimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

SHAPES = {"embedding": (7, 6), "conv": (5, 3, 2, 2), "stack": (3, 4, 5), "vector": (9,), "short": (1,), "wide": (1, 8)}
FORMS = {
    "float32": {},
    "for-loop": dict(foreach=False),
    "transposed": dict(transposed=True),
    "stacked": dict(stacked=True),
    "bf16 state": dict(state_dtype=torch.bfloat16, rounding="nearest"),
    "bf16 state, stochastic": dict(state_dtype=torch.bfloat16),
}
PLACEMENTS = {  # along each dimension of the mesh, for tensors with at least as many dimensions
    "rows": [Shard(0)],
    "columns": [Shard(1)],
    "whole": [Replicate()],
    "both": [Shard(0), Shard(1)],
    "both, the other way": [Shard(1), Shard(0)],
}


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if seed:
        found["embedding"][seed % 3 :: 3] = 0
        found["conv"][:, seed % 3] = 0
    return found


def placed(t, mesh, placements):
    "`t` on the mesh; a vector, which has no second dimension, is cut along its first."
    fitting = [Shard(0) if p == Shard(1) and t.ndim < 2 else p for p in placements]
    if t.ndim < 2 and len(placements) > 1:
        fitting = [Shard(0), Replicate()]
    whole = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=fitting)


def path(rest, nesterov, options, mesh=None, placements=None):
    "The parameters after three steps, and how many all-reduces there were."
    params = {}
    for name, t in tensors(0).items():
        params[name] = nn.Parameter(t if mesh is None else placed(t, mesh, placements))
    opt = RestOptimizer([*params.items()], rest=rest, nesterov=nesterov, **options)
    reduced, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: reduced.append(len(args[0])) or all_reduce(*args, **kwargs)
    for seed in range(1, 4):
        for name, g in tensors(seed).items():
            params[name].grad = g if mesh is None else placed(g, mesh, placements)
        opt.step()
    dist.all_reduce = all_reduce
    whole = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in params.items()}
    return whole, reduced


def refused(rank, mesh, rest):
    "What a step says when one process has no gradient, and whether all is as it was."
    params = {name: nn.Parameter(placed(t, mesh, [Shard(0)])) for name, t in tensors(0).items()}
    opt = RestOptimizer([*params.items()], rest=rest)
    for name, g in tensors(1).items():
        params[name].grad = None if rank and name == "conv" else placed(g, mesh, [Shard(0)])
    before = {name: p.to_local().clone() for name, p in params.items()}
    try:
        opt.step()
    except RuntimeError as e:
        return str(e), all(torch.equal(p.to_local(), before[name]) for name, p in params.items()) and not opt.state
    return "no error", False


def of_rank(rank, store, out):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    meshes = {1: init_device_mesh("cpu", (2,)), 2: init_device_mesh("cpu", (2, 1))}
    found = {"refused": refused(rank, meshes[1], "row_norm")}
    for rest, nesterov in RULES:
        for form, options in FORMS.items():
            found[rest, nesterov, form] = path(rest, nesterov, options)
            for name, placements in PLACEMENTS.items():
                mesh = meshes[len(placements)]
                found[rest, nesterov, form, name] = path(rest, nesterov, options, mesh, placements)
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return on_two_processes(of_rank, tmp_path_factory.mktemp("rest"))


@pytest.mark.parametrize("rest, nesterov", RULES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("placements", PLACEMENTS)
def test_two_processes_make_the_steps_of_one(two_processes, rest, nesterov, form, placements):
    if form == "bf16 state, stochastic" and placements != "whole":
        pytest.skip("the noise of a shard is not that of the whole tensor")
    for found in two_processes:
        alone, _ = found[rest, nesterov, form]
        shared, _ = found[rest, nesterov, form, placements]
        for name, p in alone.items():
            torch.testing.assert_close(shared[name], p, rtol=1e-6, atol=1e-6, msg=name)
            assert not torch.equal(p, tensors(0)[name])


def test_processes_agree_in_fewer_bits(two_processes):
    "Noise differs from one process to two; the path does not by much."
    for found in two_processes:
        for placements in PLACEMENTS:
            alone, _ = found["row_norm", True, "bf16 state, stochastic"]
            shared, _ = found["row_norm", True, "bf16 state, stochastic", placements]
            for name, p in alone.items():
                assert (shared[name] - p).norm() < 0.05 * (p - tensors(0)[name]).norm()


def test_rows_of_a_step_travel_in_one_message(two_processes):
    for found in two_processes:
        for form in ("float32", "for-loop", "transposed", "stacked"):
            for rest, nesterov in RULES:
                assert found[rest, nesterov, form][1] == found[rest, nesterov, form, "whole"][1] == []
                for placements in ("rows", "columns"):
                    assert len(found[rest, nesterov, form, placements][1]) == (3 if rest == "row_norm" else 0)
        # whole rows send one number for each tensor, vectors their only row in addition
        numbers = found["row_norm", False, "float32", "rows"][1]
        assert numbers == [4 + 2 * 3] * 3


def test_a_gradient_that_one_process_lacks_is_an_error_in_both(two_processes):
    for found in two_processes:
        said, unchanged = found["refused"]
        assert "conv: a gradient on rank 0, but no gradient on rank 1" in said and unchanged
