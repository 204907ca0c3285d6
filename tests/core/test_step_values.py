"""The right value of a step where an error of one line would hide: rates of 0, kernels without decay, narrow momenta.

Expected values are computed here in double precision from the state before the step."""

import copy
import math
from unittest.mock import patch

import pytest
import torch
from common import param, steps, twin
from torch import nn

import sgd_sai.kernels
from sgd_sai import Adan, SGDSaI
from sgd_sai.adan import adan_reference
from sgd_sai.internals import rounding
from sgd_sai.internals.rounding import BLOCK, decode, decode_momentum, encode_, init_momentum, random_bits, step_rounded
from sgd_sai.sgd_sai import sgd_sai_reference

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")
FLOAT32, FLOAT64, BF16, INT8 = torch.float32, torch.float64, torch.bfloat16, torch.int8


def momentum_of(state, dtype=FLOAT64):
    "The momentum in double precision."
    m = state["momentum_buffer"]
    return decode_momentum(state, dtype) if m.dtype == INT8 else m.to(dtype)


def expected_step(opt, p, g):
    "Parameter (with what a compensation holds) and momentum after the next step, in double precision, unrounded."
    group, state = opt.param_groups[0], opt.state[p]
    mu, lr = group["momentum"], group["lr"]
    theta = p.detach().double() + state.get("compensation", torch.zeros(())).double()
    m = torch.lerp(momentum_of(state), g.double(), 1 - mu)
    update = mu * m + (1 - mu) * g.double() if group["nesterov"] else m
    sign = 1 if group["maximize"] else -1
    return theta * (1 - lr * group["weight_decay"]) + sign * lr * state["gsnr"] * update, m


FLAGS = [{}, dict(fused=True), dict(foreach=True), dict(foreach=False, fused=False), dict(capturable=True)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.5, False), (0.9, False), (0.7, True)])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_follow_the_equations(flags, momentum, nesterov, weight_decay, maximize):
    "Every kernel, with and without momentum and decay: with one of them 0 another branch is taken."
    p, state = param(40, 30), {}
    theta = p.detach().double()
    kw = dict(lr=0.02, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, maximize=maximize)
    opt = SGDSaI([p], **kw, **flags)
    for _ in range(5):
        g = torch.randn(40, 30) + 0.1
        theta = sgd_sai_reference(theta, g.double(), state, **kw)
        steps(opt, [p], [g])
        torch.testing.assert_close(p.detach().double(), theta, rtol=1e-6, atol=1e-6)
        if momentum:
            torch.testing.assert_close(momentum_of(opt.state[p]), state["momentum_buffer"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("cache_chunk", [15, 40, 1 << 21])
def test_many_tensors_of_several_kinds(flags, cache_chunk, monkeypatch):
    "Small and large ones, dtypes and momenta mixed, in several batches: each has its own scale and its own gradient."
    monkeypatch.setattr(sgd_sai.kernels, "CACHE_CHUNK", cache_chunk)
    monkeypatch.setattr(sgd_sai.kernels, "SINGLE_CORE_MAX", 12)
    shapes = [(5,), (30, 7), (3, 4), (2,), (40,), (1,), (7,)] * 2
    dtypes = [FLOAT32] * 9 + [FLOAT64] * 4 + [FLOAT32]
    params = [param(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    exact, states = [p.detach().double() for p in params], [{} for _ in params]
    opt = SGDSaI(params, lr=0.02, weight_decay=0.1, **flags)
    for t in range(4):
        grads = [torch.randn(p.shape).to(p.dtype) + 0.2 for p in params]
        if t == 0:
            grads[1], grads[4] = torch.zeros_like(grads[1]), torch.zeros_like(grads[4])  # they wait, and decay
        if t == 3:  # the momentum of one has another dtype, as after a change of state_dtype
            opt.state[params[6]]["momentum_buffer"] = opt.state[params[6]]["momentum_buffer"].double()
            if flags.get("fused"):
                break
        exact = [
            sgd_sai_reference(theta, g.double(), state, lr=0.02, weight_decay=0.1)
            for theta, g, state in zip(exact, grads, states, strict=True)
        ]
        steps(opt, params, grads)
        for p, theta in zip(params, exact, strict=True):
            torch.testing.assert_close(p.detach().double(), theta, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("small, large, calls", [(3, 0, 0), (0, 2, 4), (3, 2, 4)])
def test_large_tensors_alone_wake_all_cores(small, large, calls):
    "Two calls of the fused kernel for each large tensor with decay, whatever stands beside it."
    params = [param(3) for _ in range(small)] + [param(50, 4) for _ in range(large)]
    opt, real = SGDSaI(params), torch._fused_sgd_
    for p in params:
        p.grad = torch.randn_like(p)
    with patch.object(torch, "_fused_sgd_", side_effect=real) as kernel:
        opt.step()
    assert kernel.call_count == calls


@pytest.mark.parametrize("capturable", [False, True])
def test_normalize_divides_by_the_largest_scale_of_all_groups(capturable):
    params = [param(40, 30), param(7), param(90, 20)]
    twins, grads = [twin(p) for p in params], [torch.randn(p.shape) + 0.1 for p in params]
    kw = dict(weight_decay=0.0, capturable=capturable)
    opt = SGDSaI([{"params": params[:2]}, {"params": params[2:]}], lr=2.0, normalize=True, **kw)
    plain = SGDSaI([{"params": twins[:2]}, {"params": twins[2:]}], lr=0.0, **kw)
    steps(plain, twins, grads)
    for group in plain.param_groups:
        group["lr"] = 2.0 / max(plain.scales().values())
    steps(opt, params, grads)
    for p in params:
        opt.state[p]["momentum_buffer"].zero_()
    for p in twins:
        plain.state[p]["momentum_buffer"].zero_()
    start = [p.detach().clone() for p in params]
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    steps(opt, params, grads), steps(plain, twins, grads)
    for p, q, before in zip(params, twins, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert not torch.equal(p, before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("flags", [{}, dict(fused=True), dict(foreach=True), dict(foreach=False, fused=False)], ids=str)
def test_rate_of_zero_moves_the_momentum_alone(flags, weight_decay, momentum):
    "As a warm-up has it in its first step."
    p = param(40, 30)
    start, gs = p.detach().clone(), [torch.randn(40, 30) for _ in range(3)]
    opt = SGDSaI([p], lr=0.0, momentum=momentum, weight_decay=weight_decay, **flags)
    steps(opt, [p], *([g] for g in gs))
    assert torch.equal(p, start) and opt.scales()
    if momentum:
        m = gs[0]
        for g in gs:
            m = torch.lerp(m, g, 0.1)
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], m, rtol=1e-5, atol=1e-6)


LAYOUTS = {  # of the parameter, and of its gradient
    "plain": (lambda t: t, lambda t: t),
    "channels last": (lambda t: t.to(memory_format=torch.channels_last),) * 2,
    "gradient otherwise": (lambda t: t, lambda t: t.to(memory_format=torch.channels_last)),
    "with gaps": (lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("state_dtype", [None, FLOAT32, INT8], ids=str)
@pytest.mark.parametrize("p_dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_parameter_and_compensation_hold_the_exact_step(p_dtype, state_dtype, layout, nesterov, monkeypatch):
    "Kahan's compensation is what rounding takes from the parameter, whatever its momentum is stored in."
    monkeypatch.setattr(rounding, "FP32_CHUNK", 1024)
    monkeypatch.setattr("sgd_sai.internals.chunks.FP32_CHUNK", 1024)
    p = nn.Parameter(layout[0](torch.randn(10, 12, 5, 4).to(p_dtype)))
    opt = SGDSaI([p], lr=1e-3, rounding="kahan", state_dtype=state_dtype, nesterov=nesterov)
    coarse = torch.finfo(p_dtype).eps
    for t in range(4):
        g = layout[1](torch.randn(10, 12, 5, 4).to(p_dtype))
        if t:
            expected, m = expected_step(opt, p, g)
        p.grad = g
        opt.step()
        if t:
            found = p.detach().double() + opt.state[p]["compensation"].double()
            assert ((found - expected).abs() <= coarse**2 * expected.abs() + 1e-6).all()
            error = {None: coarse, FLOAT32: 1e-6, INT8: 0.02}[state_dtype]
            assert (momentum_of(opt.state[p]) - m).abs().max() <= error * m.abs().max()
    assert opt.state[p]["compensation"].abs().max() > 0


@pytest.mark.parametrize("state_dtype", [FLOAT32, BF16, torch.float16, INT8], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_float64_parameters_are_computed_in_float64(state_dtype, nesterov):
    "A momentum of fewer bits is a coarser average, and no reason to compute with fewer digits."
    p = param(300, 7, dtype=FLOAT64)
    opt = SGDSaI([p], lr=0.01, state_dtype=state_dtype, nesterov=nesterov)
    for t in range(4):
        g = torch.randn(300, 7, dtype=FLOAT64)
        if t:
            expected, _ = expected_step(opt, p, g)
        steps(opt, [p], [g])
        if t:
            torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [BF16, INT8], ids=str)
def test_narrow_momentum_follows_small_changes(dtype, state_dtype):
    "Rounded to nearest it would stay where it is: 0.1 * 0.002 is less than half a step of bfloat16 at 1."
    p = nn.Parameter(torch.zeros(4096, dtype=dtype))
    opt = SGDSaI([p], lr=0.0, state_dtype=state_dtype)
    target = torch.full((4096,), 0.998).to(dtype)
    steps(opt, [p], [torch.ones(4096).to(dtype)], *[[target]] * 60)
    bits_are_enough = dtype == torch.float16 and state_dtype == BF16  # neither type is wider: rounded to nearest
    assert bits_are_enough or abs(momentum_of(opt.state[p]).mean().item() - 0.998) < 3e-4


def noisy_step(p, m, x, t=0, position=0):
    "A step that writes `x` to parameter and momentum, which are rounded stochastically."
    state = {"momentum_buffer": m, "step": t}

    def step(p_, g_, m_):
        p_.copy_(x.view(-1)[: p_.numel()].view(p_.shape)), m_.copy_(x.view(-1)[: p_.numel()].view(p_.shape))

    step_rounded(step, p, torch.zeros_like(p), state, position, True, True)
    return p.clone(), m.clone()


def test_nothing_shares_its_noise(monkeypatch):
    "Chunks, steps, parameters, and a parameter and its momentum: values that are alike are rounded differently."
    n = 2048
    monkeypatch.setattr(rounding, "FP32_CHUNK", n)
    monkeypatch.setattr("sgd_sai.internals.chunks.FP32_CHUNK", n)
    x = 1 + torch.rand(n) * 2**-7  # between 1 and the next bfloat16
    p, m = (torch.zeros(2 * n, dtype=BF16) for _ in range(2))
    first, momentum = noisy_step(p, m, x)
    pairs = {
        "chunks": (first[:n], first[n:]),
        "chunks of the momentum": (momentum[:n], momentum[n:]),
        "parameter and momentum": (first, momentum),
        "steps": (first, noisy_step(p, m, x, t=1)[0]),
        "parameters": (first, noisy_step(p, m, x, position=1)[0]),
        "momenta": (momentum, noisy_step(p, m, x, position=1)[1]),
    }
    for name, (a, b) in pairs.items():
        up, also_up = (t.float() > 1.004 for t in (a, b))
        share = x[: len(up)].sub(1).mul(2**7).square() + (1 - x[: len(up)].sub(1).mul(2**7)).square()
        agreement = (up == also_up).double().mean().item()
        assert agreement == pytest.approx(share.mean().item(), abs=0.05), name  # as of independent draws
    assert torch.equal(noisy_step(p, m, x)[0], first)  # and the same key gives the same


def test_chunks_of_eight_bits_do_not_share_their_noise(monkeypatch):
    n = 8 * BLOCK
    monkeypatch.setattr(rounding, "FP32_CHUNK", n)
    monkeypatch.setattr("sgd_sai.internals.chunks.FP32_CHUNK", n)
    p = nn.Parameter(torch.zeros(2 * n))
    opt = SGDSaI([p], lr=0.0, state_dtype=INT8)
    steps(opt, [p], *([torch.randn(n).repeat(2)] for _ in range(3)))
    codes = opt.state[p]["momentum_buffer"]
    assert not torch.equal(codes[:n], codes[n:])


def test_largest_entry_of_a_block_keeps_its_code():
    "Divided by itself it may come out as a bit more than 1: its code is 127 all the same, and not -128."
    blocks = torch.rand(4096, BLOCK) * torch.rand(4096, 1)
    blocks[:, 7] = blocks.amax(1) * 1.5
    exact = (blocks * torch.where(torch.rand_like(blocks) < 0.5, -1.0, 1.0)).flatten()
    codes, absmax = torch.empty(len(exact), dtype=INT8), torch.empty(4096)
    for random in (None, torch.zeros(len(exact), dtype=torch.int32), torch.full((len(exact),), 65535).int()):
        encode_(codes, absmax, exact.clone(), random)
        top = codes.view(4096, BLOCK)[:, 7]
        assert torch.equal(top.int(), 127 * exact.view(4096, BLOCK)[:, 7].sign().int())
        assert codes.min() >= -127
        read = decode(codes, absmax).view(4096, BLOCK)[:, 7]
        torch.testing.assert_close(read, exact.view(4096, BLOCK)[:, 7], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kahan", [False, True])
def test_layout_that_changes_after_the_momentum_was_made_is_written_back(kahan):
    "Codes keep the order in memory in which they were made; the step works on copies in that order."
    dtype = BF16 if kahan else FLOAT32
    kw = dict(lr=0.01, state_dtype=INT8, rounding="kahan" if kahan else None)
    p = nn.Parameter(torch.randn(6, 8, 5, 5).to(dtype))
    q, gs = twin(p), [torch.randn(6, 8, 5, 5).to(dtype) for _ in range(5)]
    opt, other = SGDSaI([p], **kw), SGDSaI([q], **kw)
    for t, g in enumerate(gs):
        if t == 2:
            q.data = q.data.to(memory_format=torch.channels_last)
            q.grad = None
        g_of_q = g.to(memory_format=torch.channels_last) if t == 3 else g.clone()
        kept = g_of_q.clone()
        p.grad, q.grad = g.clone(), g_of_q
        opt.step(), other.step()
        assert torch.equal(p, q) and torch.equal(g_of_q, kept)
        if kahan:
            assert torch.equal(opt.state[p]["compensation"], other.state[q]["compensation"])
            residual = other.state[q]["compensation"]
            if t == 2:
                other.state[q]["compensation"] = residual.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("part", range(11))
def test_codes_to_nearest_are_the_nearer_ones(part):
    "A value between the squares of two codes goes to the nearer square."
    low = torch.arange(127.0)
    exact = torch.cat([(low**2 + part / 10 * (2 * low + 1)) / 127**2, torch.ones(1)])
    codes, absmax = torch.empty(128, dtype=INT8), torch.empty(1)
    encode_(codes, absmax, exact)
    if part != 5:  # half way either is right
        assert torch.equal(codes[:127], (low + (part > 5)).to(INT8)) and codes[127] == 127


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [FLOAT32, BF16, INT8], ids=str)
def test_first_momentum_is_the_first_gradient(dtype, layout):
    "Entry by entry, whatever the order in memory of parameter and gradient."
    p, g = layout[0](torch.zeros(6, 8, 5, 5)), layout[1](torch.randn(6, 8, 5, 5))
    m = momentum_of(init_momentum(g, p, dtype))
    assert (m - g.double()).abs().max() <= {FLOAT32: 0.0, BF16: 2**-8, INT8: 0.01}[dtype] * g.abs().max()


def test_noise_is_that_of_earlier_versions():
    "A run that is resumed goes on with the same numbers: these are part of what a checkpoint means."
    assert random_bits(4, 3, 1, 0).tolist() == [15805, 26719, 17544, 5779]
    assert random_bits(3, 70, 2, 1).tolist() == [53471, 8565, 34212]


def test_steps_in_cuda_graphs_round_to_nearest():
    "Noise would be the same in every replay."
    p = param(40, 30)
    opt = SGDSaI([p], capturable=True, state_dtype=BF16)
    for _ in range(3):
        g = torch.randn(40, 30)
        m = momentum_of(opt.state[p], FLOAT32) if p in opt.state else g.bfloat16().float()
        steps(opt, [p], [g])
        assert torch.equal(opt.state[p]["momentum_buffer"], torch.lerp(m, g, 0.1).bfloat16())
    assert "step" not in opt.state[p]


@pytest.mark.parametrize("flags", [{}, dict(foreach=False), dict(foreach=True), dict(capturable=True)], ids=str)
def test_two_steps_of_adan_by_hand_with_three_different_rates(flags):
    """Rates 1/2, 1/4, 3/4, gradients 4 and 2.

    m = 2, 2; v = 0, -3/2; n = 4, 3 + (2 - 1/2)^2 / 4 = 57/16; divided by their corrections m = 4, 8/3, v = 0, -8/5,
    n = 16, 57/7."""
    p, theta, kept, betas = nn.Parameter(torch.tensor([1.0])), torch.tensor([1.0]), {}, (0.5, 0.25, 0.75)
    opt = Adan([p], lr=0.1, betas=betas, eps=0, **flags)
    for g, expected in ((4.0, 0.9), (2.0, 0.9 - 0.1 * (8 / 3 - 8 / 5 / 4) / math.sqrt(57 / 7))):
        steps(opt, [p], [torch.tensor([g])])
        theta = adan_reference(theta, torch.tensor([g]), kept, lr=0.1, betas=betas, eps=0)
        assert p.item() == pytest.approx(expected, rel=1e-6) and theta.item() == pytest.approx(expected, rel=1e-6)
    state = {key: opt.state[p][key].item() for key in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")}
    assert state == dict(exp_avg=2, exp_avg_diff=-1.5, exp_avg_sq=57 / 16, neg_pre_grad=-2)


@pytest.mark.parametrize("eps", [0.0, 1.0])
@pytest.mark.parametrize("capturable", [False, True])
def test_path_of_adan_is_measured_with_eps(eps, capturable):
    "First step of gradients 3 and -1: it is lr g / (|g| + eps), its length lr^2 g^2 / (|g| + eps)."
    p = nn.Parameter(torch.zeros(2))
    opt = Adan([p], lr=0.1, eps=eps, restart_radius=1e6, capturable=capturable)
    steps(opt, [p], [torch.tensor([3.0, -1.0])])
    path = 0.01 * (9 / (3 + eps) + 1 / (1 + eps))
    assert opt.state[p]["path"].item() == pytest.approx(path, rel=1e-5)
    before, first = p.detach().clone(), copy.deepcopy(opt.state[p])
    steps(opt, [p], [torch.tensor([1.0, -1.0])])
    n_hat = opt.state[p]["exp_avg_sq"] / (1 - 0.99**2)
    added = ((n_hat.sqrt() + eps) * (p.detach() - before).square()).sum().item()
    assert opt.state[p]["path"].item() == pytest.approx(first["path"].item() + added, rel=1e-4)


@pytest.mark.parametrize("flags", [{}, dict(foreach=False), dict(foreach=True)], ids=str)
@pytest.mark.parametrize("dtype, state_dtype", [(FLOAT32, None), (BF16, None), (torch.float16, None), (FLOAT32, BF16)])
def test_adan_keeps_the_last_gradient(dtype, state_dtype, flags):
    "With its sign changed, rounded once; the next step sees the difference to it."
    p = param(40, 30, dtype=dtype)
    opt = Adan([p], state_dtype=state_dtype, rounding="nearest", **flags)
    for _ in range(3):
        g = torch.randn(40, 30).to(dtype)
        steps(opt, [p], [g])
        assert torch.equal(opt.state[p]["neg_pre_grad"], -g.to(state_dtype or dtype))


def test_adan_keeps_one_of_two_neighbours_of_the_last_gradient():
    "Where it is narrower than the gradient: the noise decides which."
    p, g = param(40, 30), torch.randn(40, 30)
    opt = Adan([p], state_dtype=BF16)
    steps(opt, [p], [g])
    down = (g.view(torch.int32) & -(1 << 16)).view(FLOAT32)
    up = ((g.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(FLOAT32)
    kept = -opt.state[p]["neg_pre_grad"].float()
    assert ((kept == down) | (kept == up)).all() and 0.3 < (kept == up).float().mean() < 0.7


@pytest.mark.parametrize("flags", [{}, dict(foreach=False), dict(foreach=True), dict(capturable=True)], ids=str)
def test_adan_at_a_rate_of_zero(flags):
    "Nothing moves, with decay too, and the averages go on."
    p = param(40, 30)
    start = p.detach().clone()
    opt = Adan([p], lr=0.0, weight_decay=0.1, **flags)
    steps(opt, [p], *([torch.randn(40, 30)] for _ in range(3)))
    assert torch.equal(p, start) and opt.state[p]["step"] == 3 and opt.state[p]["exp_avg"].abs().max() > 0
