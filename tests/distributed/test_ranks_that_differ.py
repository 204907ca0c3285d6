"""Two processes whose optimizers hold different parameters, or are in another state: an error in both that says where.

Without the comparison the sums of one tensor are added to those of another, or the processes crash in gloo.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
from common import on_two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI
from sgd_sai.internals.sharding import check_same_in_group, check_same_tensors, register_fsdp1, to_local

SHAPES = {"embed": (10, 6), "up": (7, 6), "bias": (7,), "gain": (7,), "head": (3, 7)}


def sharded(mesh, shape, placement=None, dtype=torch.float32):
    "A parameter of which this process holds a part, with a gradient."
    torch.manual_seed(sum(shape))
    whole = DTensor.from_local(torch.randn(shape, dtype=dtype), mesh, [Replicate()], run_check=False)
    p = nn.Parameter(whole.redistribute(placements=[placement or Shard(0)]))
    p.grad = torch.sin(5 * p.detach())
    return p


def model(mesh):
    return {name: sharded(mesh, shape) for name, shape in SHAPES.items()}


def step(opt):
    "The error of a step, and whether everything is as it was."
    params = [p for group in opt.param_groups for p in group["params"]]
    before, states = [p.detach().clone() for p in params], {p: dict(state) for p, state in opt.state.items()}
    said = "no error"
    try:
        opt.step()
    except RuntimeError as e:
        said = str(e)
    same = all(torch.equal(to_local(p), to_local(q)) for p, q in zip(params, before, strict=True))
    return said, same and states == {p: dict(state) for p, state in opt.state.items()}


def in_other_order(rank, params):
    names = list(params)
    names[2:4] = names[2:4][:: -1 if rank else 1]  # of equal shape, so that only the names tell
    return SGDSaI([(name, params[name]) for name in names])


def without_one(rank, params):
    return SGDSaI([(name, p) for name, p in params.items() if not rank or name != "bias"])


def without_one_gradient(rank, params):
    if rank:
        params["up"].grad = None
    return SGDSaI(params.items())


def without_any_gradient(rank, params):
    for p in params.values() if rank else ():
        p.grad = None
    return SGDSaI(params.items())


def frozen_here(rank, params):
    if rank:
        params["up"].requires_grad_(False).grad = None
    return SGDSaI(params.items())


def with_scales_here(rank, params):
    opt = SGDSaI(params.items())
    if rank:
        opt.set_scales(dict.fromkeys(params, 2.0))
    return opt


def other_shape(rank, params):
    params["head"] = sharded(params["head"].device_mesh, (3 + rank, 7))
    return SGDSaI(params.items())


def other_dtype(rank, params):
    params["head"] = sharded(params["head"].device_mesh, (3, 7), dtype=torch.float64 if rank else torch.float32)
    return SGDSaI(params.items())


def other_placement(rank, params):
    params["head"] = sharded(params["head"].device_mesh, (3, 7), Shard(rank))
    return SGDSaI(params.items())


def rest_in_other_order(rank, params):
    names = ["bias", "gain"][:: -1 if rank else 1]
    rest = {"params": [(name, params[name]) for name in names]}
    return MuonSaI([{"params": [("up", params["up"])], "muon": True}, rest])


def in_other_groups(rank, params):
    pairs = list(params.items())
    cut = 4 if rank else 1
    first, second = pairs[:cut], pairs[cut:]
    return SGDSaI([{"params": second, "weight_decay": 0.0}, {"params": first}])


def later(rank, params):
    "The first step is the same in both; then another layer is unfrozen in each."
    kept = {name: params[name].grad for name in ("up", "bias", "gain")}
    for name in kept:
        params[name].grad = None
    opt = SGDSaI(params.items())
    opt.step()
    params["bias"].grad = kept["bias"]
    name = "up" if rank else "gain"
    params[name].grad = kept[name]
    return opt


def later_without_a_gradient(rank, params):
    "A group joins in both processes after the first step; one of them has no gradient for it."
    late = params.pop("gain")
    opt = SGDSaI(params.items())
    opt.step()
    opt.add_param_group({"params": [("gain", late)]})
    if rank:
        late.grad = None
    return opt


def adan_with_restarts(rank, params):
    return Adan([(name, p) for name, p in params.items() if not rank or name != "bias"], restart_radius=1.0)


def adan_without_one_gradient(rank, params):
    "In its second step: the paths are added up in each."
    grad = params["up"].grad
    opt = Adan(params.items(), restart_radius=1.0)
    opt.step()
    params["up"].grad = None if rank else grad
    return opt


def adahessian_in_other_order(rank, params):
    "Whole parameters, whose curvature is averaged over the processes."
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))
    pairs = list(net.named_parameters())
    opt = AdaHessian([pairs[i] for i in ([0, 3, 2, 1] if rank else [0, 1, 2, 3])])
    net(torch.ones(2, 6)).square().sum().backward(create_graph=True)
    return opt


def adahessian_without_gradients(rank, params):
    opt = adahessian_in_other_order(0, params)
    if rank:
        opt.zero_grad()
    return opt


CASES = {
    in_other_order: "at position 2 stands bias on rank 0, but gain on rank 1",
    without_one: "rank 1 lacks bias",
    without_one_gradient: "up: no scale and a gradient on rank 0, but no scale and no gradient on rank 1",
    without_any_gradient: "embed, up, bias, gain, head: no scale and a gradient on rank 0, but no scale",
    frozen_here: "up: no scale and a gradient on rank 0, but no scale and no gradient on rank 1",
    with_scales_here: "embed, up, bias, gain, head: no scale and a gradient on rank 0, but a scale on rank 1",
    other_shape: "head: shape (3, 7) on rank 0, but shape (4, 7) on rank 1",
    other_dtype: "head: float32 on rank 0, but float64 on rank 1",
    other_placement: "head: placed S(0) on rank 0, but placed S(1) on rank 1",
    rest_in_other_order: "stands bias on rank 0, but gain on rank 1",
    in_other_groups: "at position 0 stands up on rank 0, but head on rank 1",
    later_without_a_gradient: "gain: no scale and a gradient on rank 0, but no scale and no gradient on rank 1",
    adan_with_restarts: "rank 1 lacks bias",
    adan_without_one_gradient: "up: a gradient on rank 0, but no gradient on rank 1",
    adahessian_in_other_order: "at position 1 stands 0.bias on rank 0, but 2.bias on rank 1",
    adahessian_without_gradients: "rank 1 lacks 0.weight, 0.bias, 2.weight, 2.bias",
    later: "gain: no scale and a gradient on rank 0, but no scale and no gradient on rank 1",
}


def fsdp1(rank, reverse, **settings):
    "The error of a step with the shards of FSDP1, or the scales."
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(0)
    net = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 7)), use_orig_params=True, device_id=torch.device("cpu")
    )
    pairs = list(net.named_parameters())
    opt = SGDSaI(pairs[:: -1 if reverse and rank else 1], **settings)
    register_fsdp1(opt, net)
    net(torch.ones(2, 6)).square().sum().backward()
    try:
        with torch.device("meta"):  # as a default, which must not matter
            opt.step()
    except RuntimeError as e:
        return str(e)
    return opt.scales()


def error_of(check, *args):
    try:
        check(*args)
    except RuntimeError as e:
        return str(e)
    return "no error"


def the_same(rank, mesh):
    "What must not be an error: equal optimizers, and whatever is not sharded."
    params = model(mesh) | {f"own {rank}": nn.Parameter(torch.ones(2 + rank))}
    params[f"own {rank}"].grad = torch.ones(2 + rank)
    opt = SGDSaI(params.items())
    first = error_of(opt.step)
    opt.zero_grad()
    return [first, error_of(opt.step), error_of(SGDSaI(model(mesh).values()).step), opt.scales()]


def in_groups(rank):
    whole = [torch.zeros(3), torch.zeros(3)]
    names = ["a", "b"][:: -1 if rank else 1]
    return {
        "equal": error_of(check_same_in_group, ["a", "b"], whole, None, "cpu"),
        "order": error_of(check_same_in_group, names, whole, None, "cpu"),
        "count": error_of(check_same_in_group, ["a", "b"][: 2 - rank], whole[: 2 - rank], dist.group.WORLD, "cpu"),
        "not sharded": error_of(check_same_tensors, names, whole),
    }


def two_that_differ(rank, store, out):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {"the same": the_same(rank, mesh), "groups": in_groups(rank)}
    for case in CASES:
        params = model(mesh)
        opt = case(rank, params)
        found[case.__name__] = step(opt)
    found["FSDP1"] = [fsdp1(rank, reverse) for reverse in (False, True)]
    found["FSDP1, own rule"] = fsdp1(rank, False, scale=lambda grad: grad.norm())
    opt, other = in_other_order(rank, model(mesh)), SGDSaI(model(mesh).items())
    with torch.device("meta"):
        found["default device"] = [error_of(opt.step), error_of(other.step)]
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return on_two_processes(two_that_differ, tmp_path_factory.mktemp("differ"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_ranks_that_differ_are_an_error_in_both_that_says_where(two_processes, case):
    for found in two_processes:
        said, unchanged = found[case.__name__]
        assert CASES[case] in said and "in every process" in said
        assert unchanged
    assert two_processes[0][case.__name__] == two_processes[1][case.__name__]


def test_shards_of_fsdp1_are_compared_as_well(two_processes):
    right, wrong = zip(*(found["FSDP1"] for found in two_processes), strict=True)
    assert right[0] == right[1] and len(right[0]) == 4
    assert all(
        "stands 0.weight on rank 0, but 1.bias on rank 1" in said.replace("_fsdp_wrapped_module.", "") for said in wrong
    )


def test_shards_of_fsdp1_are_not_shown_to_a_rule_of_ones_own(two_processes):
    for found in two_processes:
        assert "a function as scale would see a shard of" in found["FSDP1, own rule"]


def test_the_comparison_under_another_default_device(two_processes):
    for found in two_processes:
        wrong, right = found["default device"]
        assert "stands bias on rank 0, but gain on rank 1" in wrong and right == "no error"


def test_equal_ranks_and_unsharded_parameters_are_no_error(two_processes):
    for rank, found in enumerate(two_processes):
        *errors, scales = found["the same"]
        assert errors == ["no error"] * 3
        assert scales.keys() == {*SHAPES, f"own {rank}"}
    scales = [found["the same"][-1] for found in two_processes]
    assert all(scales[0][name] == scales[1][name] for name in SHAPES)


def test_whole_tensors_that_are_averaged_in_a_group_are_compared(two_processes):
    for found in two_processes:
        assert found["groups"]["equal"] == found["groups"]["not sharded"] == "no error"
        assert "at position 0 stands a on rank 0, but b on rank 1" in found["groups"]["order"]
        assert "rank 1 lacks b" in found["groups"]["count"]
