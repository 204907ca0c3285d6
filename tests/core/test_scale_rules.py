"""The table of scale rules that users add to, and what g-SNR asks of a device."""

import copy
import math

import pytest
import torch
from common import on_two_processes, param
from torch import nn

from sgd_sai import SGDSaI, gsnr
from sgd_sai.gsnr import gsnr_values, norm_mean_std
from sgd_sai.internals.chunks import chunks, same_layout
from sgd_sai.scale_rules import (
    BUILT_IN_RULES,
    SCALE_RULES,
    _largest_entries,
    get_scale_rule,
    measure_scales,
    register_scale_rule,
)

pytestmark = pytest.mark.usefixtures("seeded")


def trust_ratio(grad, param):
    return param.norm() / grad.norm()


@pytest.fixture
def own_rule():
    "A name under which `trust_ratio` is registered during one test."
    register_scale_rule("trust_ratio", trust_ratio)
    yield "trust_ratio"
    del SCALE_RULES["trust_ratio"]


def first_scales(scale, model):
    "Scales after a step at a rate of zero, which measures and leaves the model as it is."
    opt = SGDSaI(model.named_parameters(), lr=0.0, scale=scale)
    opt.step()
    return opt.scales()


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model(torch.randn(4, 6)).square().sum().backward()
    return model


def test_a_rule_of_ones_own_works_by_name_with_gradient_and_parameter(own_rule, model):
    expected = {name: trust_ratio(p.grad, p.detach()).item() for name, p in model.named_parameters()}
    assert first_scales(own_rule, model) == pytest.approx(expected)
    assert first_scales(trust_ratio, model) == pytest.approx(expected)  # without a name


def test_a_rule_of_the_gradient_alone_keeps_working(model):
    expected = {name: p.grad.abs().max().item() for name, p in model.named_parameters()}
    assert first_scales(lambda grad: grad.abs().max(), model) == pytest.approx(expected)
    assert first_scales(lambda grad, power=1: grad.abs().max() ** power, model) == pytest.approx(expected)


def test_functions_in_c_and_functions_with_defaults_are_given_the_gradient_alone():
    grads = [torch.randn(4, 3)]
    assert measure_scales(grads, torch.linalg.vector_norm, params=grads) == [pytest.approx(grads[0].norm().item())]
    assert measure_scales(grads, gsnr, params=grads) == [pytest.approx(gsnr(grads[0]).item())]


def test_the_rules_of_the_table_are_what_measure_scales_measures():
    grads = [torch.randn(300, 20), torch.randn(7)]
    for name in BUILT_IN_RULES:
        one_by_one = [float(SCALE_RULES[name](grad, None)) for grad in grads]
        assert measure_scales(grads, name) == pytest.approx(one_by_one, rel=1e-6)


def test_whatever_the_rule_zero_waits_and_not_finite_is_nan(own_rule):
    grads = [torch.zeros(3), torch.tensor([1.0, math.inf])]
    zero, infinite = measure_scales(grads, own_rule, params=[torch.ones(3), torch.ones(2)])
    assert zero == 0 and math.isnan(infinite)


def test_a_checkpoint_has_the_name_of_the_rule(own_rule, model):
    opt = SGDSaI(model.named_parameters(), scale=own_rule)
    opt.step()
    other = SGDSaI(copy.deepcopy(model).named_parameters())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.param_groups[0]["scale"] == own_rule and other.scales() == opt.scales()


def test_an_unknown_name_is_answered_with_the_known_ones(own_rule, model):
    known = r"Invalid scale: 'trust' \(known: 'gsnr', 'sqrt_numel', .*'trust_ratio', or a function of the gradient\)"
    with pytest.raises(ValueError, match=known):
        get_scale_rule("trust")
    with pytest.raises(ValueError, match=known):
        SGDSaI(model.parameters(), scale="trust")
    with pytest.raises(ValueError, match=known):
        measure_scales([torch.randn(3)], "trust")


def test_built_in_rules_stay_and_own_rules_may_be_replaced(own_rule):
    for name in BUILT_IN_RULES:
        with pytest.raises(ValueError, match="is a built-in scale rule"):
            register_scale_rule(name, trust_ratio)
    with pytest.raises(TypeError, match="a scale rule is a name and a function"):
        register_scale_rule("number", 3.0)
    register_scale_rule(own_rule, lambda grad, param: 2.0)
    assert measure_scales([torch.randn(3)], own_rule) == [2.0]


def sharded_rules(rank, store, out):
    "Scales of a matrix that is sharded over two processes, by rules of the gradient and of the parameter."
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    p, g = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    register_scale_rule("trust_ratio", trust_ratio)
    expected = trust_ratio(g, p).item()
    placed = nn.Parameter(distribute_tensor(p, mesh, [Shard(0)]))
    placed.grad = distribute_tensor(g, mesh, [Shard(0)])
    opt = SGDSaI([("p", placed)], scale="trust_ratio")
    opt.step()
    torch.save((expected, opt.scales()["p"]), f"{out}.{rank}")
    dist.destroy_process_group()


def test_a_rule_sees_the_whole_of_sharded_tensors(tmp_path):
    for expected, scale in on_two_processes(sharded_rules, tmp_path):
        assert scale == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (300,), (200, 300)], ids=str)
def test_gsnr_asks_the_device_for_nothing(shape, dtype):
    "On the meta device, which cannot answer, every question to the host is an error."
    G = gsnr(torch.empty(shape, dtype=dtype, device="meta"))
    assert G.shape == () and G.device.type == "meta"
    assert G.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("correction", [0, 1])
def test_all_readers_give_the_same(correction):
    "Large and small tensors, other types and layouts, all at once and one by one."
    sizes = [(2,), (5,), (5,), (5,), (768,), (4096,), (100, 100), (64, 3, 5, 5)]
    grads = [torch.randn(size) * 10.0**-i + 0.3 * i * 10.0**-i for i, size in enumerate(sizes)]
    grads += [grads[-2].t(), grads[-1].contiguous(memory_format=torch.channels_last), 1e3 + torch.randn(5000)]
    values = gsnr_values(grads, correction=correction)
    assert values == pytest.approx([gsnr(grad, correction=correction).item() for grad in grads], rel=1e-6)
    wide = [gsnr(grad.double(), correction=correction).item() for grad in grads]
    assert values == pytest.approx(wide, rel=3e-5)
    exact = grads[6].double()
    expected = exact.norm(), exact.mean(), exact.std(correction=correction)
    for moment, value in zip(norm_mean_std(grads[6], correction), expected, strict=True):
        torch.testing.assert_close(moment, value, rtol=1e-6, atol=0)


def test_small_gsnr_is_differentiable():
    g = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: gsnr(g, eps=1e-3), (g,))


def test_chunks_cover_a_tensor_once():
    for shape, size in (((10, 7), 9), ((3,), 100), ((50, 2), 7)):
        p = param(*shape)
        for other in (torch.zeros(shape), torch.zeros(shape[::-1]).t() if len(shape) == 2 else torch.zeros(shape)):
            for (target,) in chunks(other, size=size):
                target.add_(1)
            assert (other == 1).all() and sum(a.numel() for a, _ in chunks(p, other, size=size)) == p.numel()


def test_tensors_with_gaps_of_one_layout_are_cut_into_slices():
    "Equal strides are not enough: between the entries of a slice are those of others."
    whole = [torch.zeros(40, 6) for _ in range(2)]
    views = [t[:, :3] for t in whole]
    assert not same_layout(*views) and same_layout(*whole) and same_layout(*(t.t() for t in whole))
    pieces = list(chunks(*views, size=30))
    assert [a.shape for a, _ in pieces] == [(10, 3)] * 4  # as many entries as were asked for
    for a, b in pieces:
        a.add_(1), b.add_(2)
    assert all((t[:, :3] == i + 1).all() and (t[:, 3:] == 0).all() for i, t in enumerate(whole))


def test_placeholders_are_not_divided_by_a_largest_scale_of_zero():
    "The step of zero gradients at rates of zero, by which a checkpoint asks a new optimizer what it keeps."
    p = torch.nn.Parameter(torch.ones(3))
    opt = SGDSaI([p], lr=0.0, normalize=True, capturable=True)
    p.grad = torch.zeros(3)
    opt.step()
    assert torch.equal(p, torch.ones(3))


def exact_scale(grad, eps):
    "In double precision, and far from the ends of its range as well."
    wide = grad.to(torch.complex128 if grad.is_complex() else torch.float64)
    largest = wide.abs().max().item()
    return gsnr(wide / largest, eps / largest).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("n", [2, 33, 1000, 70000])
def test_scales_of_gradients_of_any_size(dtype, n):
    "Squares of 1e-23 vanish in float32, those of 1e-21 lose digits, those of 1e20 are infinite."
    base = torch.randn(n, dtype=torch.float64) + 0.3
    last = 300 if dtype == torch.float64 else 36
    grads = [(base * 10.0**e).to(dtype) for e in (*range(-36, 37), -last, last)]
    for eps in (1e-8, 1e-2):
        expected = [exact_scale(grad, eps) for grad in grads]
        assert measure_scales(grads, eps=eps, max_ratio=None) == pytest.approx(expected, rel=1e-6)


def test_eps_is_in_the_unit_of_the_gradient_when_it_is_measured_again():
    "Of a huge gradient, with an eps of a thousandth of its standard deviation or less."
    grad = 1e30 * torch.randn(500)
    for eps in (1e25, 1e26, 3e26):
        (G,) = measure_scales([grad], eps=eps)
        assert G == pytest.approx(exact_scale(grad, eps), rel=1e-6)
        assert G == pytest.approx((grad.double().norm() / (grad.double().std() + eps)).item(), rel=1e-6)
    tiny = 1e-30 * torch.randn(500)  # there eps counts as a thousandth of the root mean square
    rms = tiny.double().norm() / math.sqrt(500)
    expected = (tiny.double().norm() / (tiny.double().std() + 1e-3 * rms)).item()
    assert measure_scales([tiny]) == pytest.approx([expected], rel=1e-6)


def test_largest_entries():
    grads = [
        torch.tensor([1.0, -3.0, 2.0]),
        torch.tensor([[3 + 4j, 0]]),
        torch.zeros(0),
        torch.zeros(()),
        torch.tensor([-1e-45]),
        torch.tensor([7.0], dtype=torch.bfloat16),
    ]
    assert _largest_entries(grads) == [3.0, 5.0, 0.0, 0.0, torch.tensor(1e-45).item(), 7.0]
    for odd in (torch.tensor([1.0, math.nan]), torch.tensor([math.nan, -1.0]), torch.tensor([1.0, -math.inf])):
        assert not math.isfinite(_largest_entries([odd])[0])
    assert _largest_entries([]) == measure_scales([]) == []


def test_each_group_is_measured_with_its_own_settings():
    grads = [1e-3 * torch.randn(50), 1e-3 * torch.randn(50), torch.ones(50), torch.ones(50), torch.randn(50)]
    params = [nn.Parameter(torch.zeros(50)) for _ in grads]
    own = [dict(eps=1e-8), dict(eps=1e-6), dict(max_ratio=2.0), dict(max_ratio=3.0), dict(scale="sqrt_numel")]
    opt = SGDSaI([{"params": [p]} | settings for p, settings in zip(params, own, strict=True)])
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    opt.step()
    root = math.sqrt(50)
    expected = [gsnr(grads[0], 1e-8).item(), gsnr(grads[1], 1e-6).item(), 2 * root, 3 * root, root]
    assert [*opt.scales().values()] == pytest.approx(expected, rel=1e-6)
    assert expected[1] != pytest.approx(gsnr(grads[1], 1e-8).item(), rel=1e-4)  # eps can be told


@pytest.mark.parametrize(
    "dtype, wide",
    [
        (torch.float64, torch.float64),
        (torch.complex128, torch.float64),
        (torch.complex64, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_scales_on_the_device_keep_the_digits_of_the_parameter(dtype, wide):
    p = param(40, dtype=dtype)
    p.grad = torch.randn(40).to(dtype)
    opt = SGDSaI([p], capturable=True)
    opt.step()
    G = opt.state[p]["gsnr"]
    assert G.dtype == wide and G.shape == ()
    rel = 1e-14 if wide == torch.float64 else 1e-6
    assert G.item() == pytest.approx(measure_scales([p.grad])[0], rel=rel)
