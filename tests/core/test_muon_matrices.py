"""What MuonSaI does with a matrix: gradients that are not finite, matrices of any size, empty ones, stacks, shapes.

Each refusal names the parameter and comes before anything is changed."""

import copy
import math

import pytest
import torch
from torch import nn

from sgd_sai import MuonSaI
from sgd_sai.experiments.muon_adamw import MuonAdamW
from sgd_sai.internals.chunks import SINGLE_CORE_MAX
from sgd_sai.muon_sharing import shared_factors
from sgd_sai.muon_step import STACKED, Settings, muon_step
from sgd_sai.orthogonalize import JORDAN, orthogonalize, orthogonalize_
from sgd_sai.weight_layouts import WeightLayout

pytestmark = pytest.mark.usefixtures("seeded")
both = pytest.mark.parametrize("cls", [MuonSaI, MuonAdamW])


def net(**layout):
    return nn.Sequential(
        nn.Linear(4, 6, **layout), nn.Linear(6, 6, **layout), nn.Linear(6, 5, **layout), nn.Linear(5, 2, **layout)
    )


def give_gradients(model, scale=1.0):
    for p in model.parameters():
        p.grad = torch.randn_like(p) * scale


def everything(model, opt):
    state = {name: dict(opt.state[p]) for name, p in model.named_parameters() if p in opt.state}
    return copy.deepcopy((model.state_dict(), state))


def assert_unchanged(model, opt, before):
    torch.testing.assert_close(everything(model, opt), before, rtol=0, atol=0)


# --- gradients that are not finite ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_gradient_that_is_not_finite_is_refused_first_and_later(cls, bad, steps_before):
    model = net()
    opt = cls(model)
    for _ in range(steps_before):
        give_gradients(model)
        opt.step()
    give_gradients(model)
    model[2].weight.grad[1, 2] = bad
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match="2.weight is not finite"):
        opt.step()
    assert_unchanged(model, opt, before)
    model[2].weight.grad[1, 2] = 0.5
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_all_names_of_bad_gradients_are_said_in_every_dtype(dtype):
    model = net().to(dtype)
    opt = MuonSaI(model)
    give_gradients(model)
    opt.step()
    for layer in model[1], model[2]:
        layer.weight.grad[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="gradient of 1.weight, 2.weight is not finite"):
        opt.step()


@pytest.mark.parametrize(
    "dtype, large",
    [(torch.float32, 1e25), (torch.float32, 3e38), (torch.float64, 1e200), (torch.float16, 6e4)],
    ids=str,
)
def test_large_gradients_whose_norm_overflows_are_finite(dtype, large):
    model = net().to(dtype)
    opt = MuonSaI(model, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1.0)
    for layer in model[1], model[2]:
        layer.weight.grad = large * torch.randn(layer.weight.shape).clamp(-1, 1).to(dtype)
    before = model[1].weight.detach().clone()
    opt.step()
    assert model[1].weight.isfinite().all() and (model[1].weight - before).abs().max() > 1e-3


def test_a_grad_scaler_skips_what_would_be_refused():
    model = net()
    opt, scaler = MuonSaI(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(3, 4)).sum()).backward()
    model[1].weight.grad[0, 0] = math.inf
    before = everything(model, opt)
    scaler.step(opt)
    scaler.update()
    assert_unchanged(model, opt, before)
    assert scaler.get_scale() == 2.0


# --- matrices of any size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e25, 1e-30, 1e-22, 1e19])
def test_a_step_does_not_depend_on_the_size_of_the_gradient(size):
    "In float32 the squares of 1e25 overflow and those of 1e-30 vanish."
    ends = []
    start, g = torch.randn(6, 5), torch.randn(6, 5)
    for scale in (1.0, size):
        p, m = start.clone(), torch.zeros(6, 5)
        for t in range(3):
            muon_step([p], [g.roll(t, 0) * scale], [m], lr=0.1, weight_decay=0.0, settings=Settings(momentum=0.9))
        ends.append(p)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)
    assert (ends[0] - start).abs().max() > 0.05


def plain_orthogonalize(M):
    "As the iteration stands, with nothing done about size."
    a, b, c = JORDAN[0]
    X = M if M.shape[-2] <= M.shape[-1] else M.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X if M.shape[-2] <= M.shape[-1] else X.mT


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 8, 4), (1, 6), (6, 1)])
def test_the_fast_form_is_the_plain_iteration_where_nothing_overflows(shape):
    for scale in (1.0, 3.7e-4, 41.0):
        M = torch.randn(shape) * scale
        torch.testing.assert_close(orthogonalize(M), plain_orthogonalize(M), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, size", [(torch.float64, 1e300), (torch.float64, 1e-300), (torch.float32, 3e38)])
def test_other_dtypes_do_not_overflow_either(dtype, size):
    M = torch.rand(4, 6, dtype=dtype)
    for to in (None, torch.float32):
        expected = orthogonalize(M, dtype=to)
        torch.testing.assert_close(orthogonalize(M * size, dtype=to), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(orthogonalize(M * -size, dtype=to), -expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(orthogonalize(torch.full((4, 6), 1e-42))).all()


def test_zeros_stay_zero_beside_others():
    M = torch.stack([torch.zeros(3, 4), 1e-25 * torch.eye(3, 4), torch.zeros(3, 4)])
    factors = orthogonalize(M)
    assert not factors[[0, 2]].any() and factors[1].diagonal().min() > 0.5


# --- empty matrices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, stacked",
    [((0, 5), False), ((5, 0), False), ((0, 3, 3), False), ((0, 4, 3), True), ((2, 0, 3), True), ((2, 3, 0), True)],
    ids=str,
)
@pytest.mark.parametrize(
    "dtype, settings",
    [(torch.float32, {}), (torch.float32, dict(state_dtype=torch.int8)), (torch.bfloat16, dict(rounding="kahan"))],
    ids=str,
)
def test_an_empty_matrix_takes_no_part(shape, stacked, dtype, settings):
    empty = nn.Parameter(torch.empty(shape, dtype=dtype))
    other = nn.Parameter(torch.ones((2, 3, 3) if stacked else (3, 3), dtype=dtype))
    opt = MuonSaI([{"params": [empty, other], "muon": True, "stacked": stacked}], lr=0.1, weight_decay=0.5, **settings)
    for _ in range(2):
        empty.grad, other.grad = torch.empty_like(empty), torch.randn_like(other)
        opt.step()
    assert empty.shape == shape and opt.state[empty]["momentum_buffer"].shape == shape
    assert (other != 1).all()
    assert orthogonalize(torch.empty(0, 5)).shape == (0, 5) and orthogonalize(torch.empty(2, 5, 0)).shape == (2, 5, 0)


# --- stacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize, sign", [(False, -1), (True, 1)])
@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 2, 5, 8)])
def test_each_matrix_of_a_stack_steps_alone(maximize, sign, shape):
    stack = nn.Parameter(torch.randn(shape))
    alone = [nn.Parameter(p.clone()) for p in stack.detach().reshape(-1, *shape[-2:])]
    settings = dict(lr=0.1, weight_decay=0.1, maximize=maximize)
    one = MuonSaI([{"params": [stack], "muon": True, "stacked": True}], **settings)
    other = MuonSaI([{"params": alone, "muon": True}], **settings)
    start = stack.detach().clone()
    for t in range(3):
        stack.grad = torch.randn(shape)
        for p, g in zip(alone, stack.grad.reshape(-1, *shape[-2:]), strict=True):
            p.grad = g.clone()
        one.step(), other.step()
        torch.testing.assert_close(stack.reshape(-1, *shape[-2:]), torch.stack(alone))
        if t == 0:  # length and direction
            rows, cols = shape[-2:]
            step = stack.detach() - start * (1 - 0.1 * 0.1)
            assert (step * stack.grad).sum() * sign > 0
            values = torch.linalg.svdvals(step / (0.1 * max(1, rows / cols) ** 0.5))
            assert 0.6 < values.min() and values.max() < 1.3


def test_a_kernel_of_a_convolution_is_one_matrix():
    kernel = nn.Parameter(torch.randn(6, 4, 3))
    flat = nn.Parameter(kernel.detach().reshape(6, 12).clone())
    opts = [MuonSaI([{"params": [p], "muon": True}], lr=0.1) for p in (kernel, flat)]
    kernel.grad = torch.randn(6, 4, 3)
    flat.grad = kernel.grad.reshape(6, 12).clone()
    for opt in opts:
        opt.step()
    torch.testing.assert_close(kernel.reshape(6, 12), flat)


def test_a_stack_that_is_larger_than_the_limit_goes_in_parts(monkeypatch):
    calls, real = [], orthogonalize_
    monkeypatch.setattr("sgd_sai.muon_step.orthogonalize_", lambda X, *args: (calls.append(X.numel()), real(X, *args)))
    monkeypatch.setattr("sgd_sai.muon_step.STACKED", 250)  # three matrices of 6 x 5 with two squares of 5 x 5 each
    p, g = torch.randn(7, 6, 5), torch.randn(7, 6, 5)
    q, settings = p.clone(), dict(lr=0.1, weight_decay=0.0)
    stacks = Settings(layout=WeightLayout(stacked=True))
    muon_step([p], [g], [torch.zeros_like(p)], settings=stacks, **settings)
    assert calls == [90, 90, 30] and STACKED > 250
    for matrix, grad in zip(q, g, strict=True):
        muon_step([matrix], [grad], [torch.zeros(6, 5)], **settings)
    torch.testing.assert_close(p, q)
    calls.clear()
    params = [torch.randn(6, 5) for _ in range(7)]
    muon_step(params, params, [torch.zeros(6, 5) for _ in params], **settings)
    assert calls == [90, 90, 30]


# --- a step by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_two_steps_as_the_equations_stand(nesterov, maximize):
    start, grads, m = torch.randn(6, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64), 0
    p = nn.Parameter(start.clone())
    settings = dict(lr=0.1, weight_decay=0.3, momentum=0.8, nesterov=nesterov, maximize=maximize)
    opt = MuonSaI([{"params": [p], "muon": True}], **settings)
    theta = start
    for g in grads:
        p.grad = g.clone()
        opt.step()
        m = 0.8 * m + 0.2 * g
        update = 0.8 * m + 0.2 * g if nesterov else m
        factor = plain_orthogonalize(update) * (6 / 4) ** 0.5
        theta = theta * (1 - 0.1 * 0.3) + (0.1 if maximize else -0.1) * factor
    torch.testing.assert_close(p.detach(), theta)
    torch.testing.assert_close(opt.state[p]["momentum_buffer"], m)


# --- shapes ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("shape", [(9, 6), (2, 6), (6, 7), (36,)])
def test_a_matrix_that_does_not_fit_its_momentum_is_refused_before_anything_changes(cls, shape):
    model = net()
    opt = cls(model)
    give_gradients(model)
    opt.step()
    model[1].weight.data = torch.randn(shape)
    give_gradients(model)
    before = everything(model, opt)
    with pytest.raises(RuntimeError, match=r"1.weight does not fit: momentum_buffer has the shape \(6, 6\)"):
        opt.step()
    assert_unchanged(model, opt, before)


@both
def test_a_momentum_of_another_device_is_refused(cls):
    model = net()
    opt = cls(model)
    give_gradients(model)
    opt.step()
    opt.state[model[1].weight]["momentum_buffer"] = torch.zeros(6, 6, device="meta")
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="1.weight does not fit: momentum_buffer is on meta"):
        opt.step()
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)


# --- other defaults -------------------------------------------------------------------------------------------------


@pytest.fixture
def default_device():
    yield torch.set_default_device
    torch.set_default_device(None)


def three_steps(dtype):
    model = net(device="cpu", dtype=dtype)
    opt = MuonSaI(model, lr=torch.tensor(0.02, dtype=torch.float32, device="cpu"))
    generator = torch.Generator("cpu").manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p).normal_(generator=generator)
        opt.step()
    resumed = MuonSaI(model, lr=0.02)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    resumed.step()
    return [p.detach() for p in model.parameters()] + [opt.state[p]["momentum_buffer"] for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_default_device_changes_nothing(default_device, dtype):
    expected = three_steps(dtype)
    default_device("meta")
    found = three_steps(dtype)
    assert all(x.device.type == "cpu" and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype):
    expected = three_steps(dtype)
    torch.set_default_dtype(torch.float64)
    try:
        found = three_steps(dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(x.dtype == dtype and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_large_parameters_that_are_no_matrices_go_through_the_fused_kernel_at_their_rate():
    "The factor of the rate reaches every kernel."
    ends = []
    start = torch.randn(SINGLE_CORE_MAX + 3)
    g = torch.randn_like(start)
    for flags in ({}, dict(foreach=True), dict(foreach=False, fused=False)):
        for lr, own in ((0.02, {}), (0.03, {"lr": 0.03})):
            p = nn.Parameter(start.clone())
            opt = MuonSaI([{"params": [p], "muon": False, **own}], lr=lr, weight_decay=0.1, rest="sgd_sai", **flags)
            p.grad = g.clone()
            opt.step()
            ends.append(p.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])
    assert (ends[0] - start).abs().max() > 1e-3


# --- few bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(
    "dtype, settings, allowed",
    [
        (torch.bfloat16, dict(rounding="kahan", state_dtype=torch.float32), 1e-4),
        (torch.bfloat16, dict(rounding="stochastic", state_dtype=torch.float32), 0.02),
        (torch.float32, dict(state_dtype=torch.bfloat16), 1e-3),
        (torch.float32, dict(state_dtype=torch.int8), 5e-3),
    ],
    ids=str,
)
def test_matrices_in_few_bits_follow_those_in_float32(dtype, settings, allowed, maximize):
    start = torch.randn(24, 16).to(dtype)
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float().clone())
    common = dict(lr=0.02, weight_decay=2.0, maximize=maximize)
    opts = [MuonSaI([{"params": [narrow], "muon": True}], **common, **settings)]
    opts.append(MuonSaI([{"params": [wide], "muon": True}], **common))
    for _ in range(15):
        narrow.grad = (torch.randn(24, 16) + 0.3).to(dtype)
        wide.grad = narrow.grad.float()
        for opt in opts:
            opt.step()
    residual = opts[0].state[narrow].get("compensation", torch.zeros(()))
    end = narrow.detach().float() + residual.float()
    assert (end - wide).norm() < allowed * (wide - start.float()).norm()
    assert (wide - start.float()).norm() > 1


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(ns_coefficients="polar_express"), dict(ns_steps=2), dict(adjust_lr="match_rms_adamw")),
        *(dict(nesterov=False), dict(transposed=True), dict(split=(8, 8, 8)), dict(split=6)),
    ],
    ids=str,
)
def test_settings_of_matrices_hold_in_few_bits_too(settings):
    "Compensated parameters with momenta in float32 end where those in float32 do, with these settings alone."
    start, grads = torch.randn(24, 16).bfloat16(), torch.randn(5, 24, 16).bfloat16()

    def end(dtype, group, **options):
        p = nn.Parameter(start.to(dtype, copy=True))
        opt = MuonSaI([{"params": [p], "muon": True, **group}], lr=0.02, weight_decay=2.0, **options)
        for g in grads:
            p.grad = g.to(dtype)
            opt.step()
        return p.detach().float() + opt.state[p].get("compensation", torch.zeros(())).float()

    narrow = end(torch.bfloat16, settings, rounding="kahan", state_dtype=torch.float32)
    wide, plain = end(torch.float32, settings), end(torch.float32, {})
    moved = (wide - start.float()).norm()
    assert (narrow - wide).norm() < 1e-3 * moved and (plain - wide).norm() > 1e-2 * moved


@pytest.mark.parametrize("dtype, settings", [(torch.bfloat16, {}), (torch.float32, dict(state_dtype=torch.bfloat16))])
def test_matrices_of_one_shape_do_not_share_their_noise(dtype, settings):
    params, g = [nn.Parameter(torch.zeros(32, 32, dtype=dtype)) for _ in range(2)], torch.randn(32, 32)
    opt = MuonSaI([{"params": params, "muon": True}], lr=1e-3, rounding="stochastic", **settings)
    for _ in range(2):
        for p in params:
            p.grad = g.to(dtype)
        opt.step()
    assert not torch.equal(*params)


def test_what_a_parameter_costs_is_counted_by_its_matrices(monkeypatch):
    "Entries times the shorter side: by these numbers processes share the work."
    told = []

    def noted(updates, factors_of, costs, *args, **kw):
        told.extend(costs)
        return shared_factors(updates, factors_of, costs, *args, **kw)

    monkeypatch.setattr("sgd_sai.muon_step.shared_factors", noted)
    kinds = [((24, 16), {}), ((24, 16), dict(split=(8, 8, 8))), ((3, 8, 5), dict(stacked=True))]
    params = [nn.Parameter(torch.randn(shape).bfloat16()) for shape, _ in kinds]
    for p in params:
        p.grad = torch.randn_like(p)
    groups = [{"params": [p], "muon": True, **layout} for p, (_, layout) in zip(params, kinds, strict=True)]
    MuonSaI(groups, rounding="stochastic").step()
    assert told == [24 * 16 * 16, 3 * 8 * 16 * 8, 3 * 8 * 5 * 5]
