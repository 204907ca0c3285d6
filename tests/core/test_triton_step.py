"""Triton's kernel for the step of SGD-SaI against a reference of a dozen lines: on a GPU, else in the interpreter."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgd_sai import SGDSaI
from sgd_sai.internals.tensor_tables import TABLE_BLOCK, address_table, block_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SENTINEL = 77.0
SIZES = [0, 1, 2, 7, 300, TABLE_BLOCK, TABLE_BLOCK + 1]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module", autouse=True)
def kernel():
    "The module with the kernel; without a GPU conftest.py has asked for Triton's interpreter."
    pytest.importorskip("triton")
    from sgd_sai import triton_step

    return triton_step


def reference(p, g, m, *, G, lr, mu, weight_decay, nesterov, maximize):
    "Parameter and momentum after the step, in double precision."
    p, g, m, lr = p.double(), g.double(), m.double(), float(lr)
    m = mu * m + (1 - mu) * g
    u = g if mu == 0 else mu * m + (1 - mu) * g if nesterov else m
    return p * (1 - lr * weight_decay) + (lr if maximize else -lr) * float(G) * u, m


def inside(values, offset, dtype):
    "The values as a view that begins `offset` entries after a multiple of 16 bytes, between sentinels."
    buffer = torch.full((len(values) + 32,), SENTINEL, dtype=dtype, device=DEVICE)
    view = buffer[16 + offset : 16 + offset + len(values)]
    view.copy_(values)
    return view, buffer


def spacing(x, dtype):
    "The distance of neighbouring numbers of a dtype at x, and what float32 loses on the way to it."
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.abs().clamp_min(info.tiny)))
    return 2**exponent * info.eps


def assert_rounded(stored, exact, dtype, stochastic, terms):
    "One rounding away from `exact`, besides what float32 loses of numbers as large as `terms`."
    slack = 4 * torch.finfo(FP32).eps * terms
    allowed = spacing(exact, dtype) * (1 if stochastic else 0.5) + slack
    assert ((stored.double() - exact).abs() <= allowed * (1 + 1e-9)).all()


cases = st.fixed_dictionaries(
    {
        "sizes": st.lists(
            st.sampled_from([0, 1, 2, 7, 300, TABLE_BLOCK - 1, TABLE_BLOCK, TABLE_BLOCK + 1, 9000]),
            min_size=1,
            max_size=5,
        ),
        "offset": st.integers(0, 7),
        "dtypes": st.sampled_from(
            [(FP32,) * 3, (BF16,) * 3, (FP16,) * 3, (FP32, FP32, BF16), (BF16, FP32, BF16), (BF16, BF16, FP32)]
        ),
        "mu": st.sampled_from([0.0, 0.5, 0.9, 0.99]),
        "lr": st.sampled_from([0.0, 1e-3, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "scale": st.sampled_from([1e-3, 1.0, 30.0]),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
        "lr_on_device": st.booleans(),
        "scales_on_device": st.booleans(),
        "rounding": st.sampled_from(["nearest", "stochastic", "kahan"]),
        "seed": st.integers(0, 2**16),
    }
)


def tensors_of(case):
    "Columns p, g, m, compensation of a case, each with views and the buffers that they lie in."
    torch.manual_seed(case["seed"])
    p_dtype, g_dtype, m_dtype = case["dtypes"]
    columns = []
    for dtype, size in ((p_dtype, 1.0), (g_dtype, 1.0), (m_dtype, 1.0), (p_dtype, 1e-3)):
        columns.append([inside(torch.randn(n) * size, case["offset"], dtype) for n in case["sizes"]])
    return columns


def arguments_of(case):
    "The options of the kernel, with scales, which go by position."
    count, on_device = len(case["sizes"]), dict(dtype=FP32, device=DEVICE)
    scales = [case["scale"] * (i + 1) for i in range(count)]
    options = {key: case[key] for key in ("mu", "weight_decay", "nesterov", "maximize")}
    options["lr"] = torch.tensor(case["lr"], **on_device) if case["lr_on_device"] else case["lr"]
    if case["scales_on_device"]:
        scales = [torch.tensor(G, **on_device) for G in scales]
    if case["rounding"] == "stochastic":
        options |= dict(stochastic_p=True, stochastic_m=True, keys=list(range(1 << 33, (1 << 33) + count)))
    return scales, options


@settings(max_examples=200, deadline=None)
@given(case=cases)
def test_generated_cases_differ_from_the_reference_by_rounding_alone(kernel, case):
    (ps, gs, ms, rs), (scales, options) = tensors_of(case), arguments_of(case)
    before = [[view.clone() for view, _ in column] for column in (ps, gs, ms, rs)]
    views = [[view for view, _ in column] for column in (ps, gs, ms, rs)]
    has_kahan = case["rounding"] == "kahan" and case["dtypes"][0] != FP32
    bufs = views[2] if case["mu"] else [None] * len(ps)
    kernel.step_by_triton(views[0], views[1], bufs, scales, **options, residuals=views[3] if has_kahan else None)
    stochastic = case["rounding"] == "stochastic"
    settings_ = {key: case[key] for key in ("lr", "mu", "weight_decay", "nesterov", "maximize")}
    for i, G in enumerate(scales):
        p, g, m, r = (column[i] for column in before)
        start = p.double() + r.double() if has_kahan else p
        exact_p, exact_m = reference(start, g, m, G=G, **settings_)
        terms = p.double().abs() + float(G) * case["lr"] * (g.double().abs() + m.double().abs())
        assert_rounded(views[0][i], exact_p, p.dtype, stochastic and p.dtype == BF16, terms)
        if has_kahan:
            kept = views[0][i].double() + views[3][i].double()
            assert ((kept - exact_p).abs() <= spacing(spacing(exact_p, p.dtype), p.dtype) + 1e-6 * terms).all()
        if case["mu"]:
            assert_rounded(
                views[2][i], exact_m, m.dtype, stochastic and m.dtype == BF16, g.double().abs() + m.double().abs()
            )
        else:
            assert torch.equal(views[2][i], m)
        assert torch.equal(views[1][i], g)
    for column in (ps, gs, ms, rs):
        for view, buffer in column:
            assert (buffer == SENTINEL).sum() - (view == SENTINEL).sum() == 32  # nothing beside the view was touched


def options_of(**changes):
    return dict(lr=0.1, mu=0.9, weight_decay=0.1, nesterov=False, maximize=False) | changes


def test_stochastic_rounding_is_right_on_average_and_parameter_and_momentum_have_noise_of_their_own(kernel):
    "The momentum becomes 1 + 2**-9, a quarter of the way to its upper neighbour, the parameter the like below 1."
    n = 16384
    p, m = (torch.ones(n, dtype=BF16, device=DEVICE) for _ in range(2))
    g = torch.full((n,), 1 + 2**-8, device=DEVICE)
    options = options_of(lr=2**-10, mu=0.5, weight_decay=0.0)
    kernel.step_by_triton([p], [g], [m], [1.0], **options, keys=[7], stochastic_p=True, stochastic_m=True)
    assert set(p.tolist()) == {1.0, 1 - 2**-8} and set(m.tolist()) == {1.0, 1 + 2**-7}
    moved_p, moved_m = p < 1, m > 1
    for moved, share in ((moved_p, 0.25), (moved_m, 0.25), (moved_p & moved_m, 0.0625)):
        assert moved.float().mean().item() == pytest.approx(share, abs=0.015)


def test_gradients_of_several_dtypes_are_taken_apart(kernel):
    params = [torch.ones(5, dtype=BF16, device=DEVICE) for _ in range(3)]
    grads = [torch.full((5,), 2.0, dtype=dtype, device=DEVICE) for dtype in (FP32, BF16, FP32)]
    kernel.step_by_triton(params, grads, [None] * 3, [1.0, 2.0, 4.0], **options_of(mu=0.0, weight_decay=0.0))
    for p, expected in zip(params, (0.8, 0.6, 0.2), strict=True):
        assert p.tolist() == pytest.approx([expected] * 5, abs=2e-3)


def test_two_thousand_small_tensors_in_one_launch(kernel, monkeypatch):
    "In the interpreter, which takes a while for each block, every fiftieth of them is stepped; on a GPU all are."
    every = 1 if DEVICE.type == "cuda" else 50
    launches, table = [], block_table((256,) * 2000, DEVICE)
    assert table.tensor_of_block.tolist() == table.first_blocks.tolist() == list(range(2000))
    table = table._replace(tensor_of_block=torch.arange(0, 2000, every, dtype=torch.int32, device=DEVICE))
    table = table._replace(first_blocks=torch.arange(2000, device=DEVICE) // every)
    monkeypatch.setattr(kernel, "block_table", lambda sizes, device: launches.append(sizes) or table)
    params = list(torch.randn(2000, 256, device=DEVICE).unbind())
    grads, bufs = ([torch.randn_like(p) for p in params] for _ in range(2))
    expected = [p.double() for p in params]
    for i in range(0, 2000, every):
        expected[i], _ = reference(params[i], grads[i], bufs[i], G=1.0 + i, **options_of())
    kernel.step_by_triton(params, grads, bufs, [1.0 + i for i in range(2000)], **options_of())
    torch.testing.assert_close(torch.stack(params).double(), torch.stack(expected), rtol=1e-5, atol=1e-4)
    assert launches == [(256,) * 2000]


@pytest.mark.parametrize("first", [0, (1 << 31) // 4, 1 << 31, 3 << 31])
def test_entries_beyond_two_to_the_thirty_first_are_reached(kernel, first):
    """The kernel is given the end of a tensor that is too large for this machine: an address that far before the
    tensors that are there, and the number of the block at which they begin."""
    n = TABLE_BLOCK
    p, g, m = (torch.randn(n, device=DEVICE) for _ in range(3))
    expected, _ = reference(p, g, m, G=2.0, **options_of())
    table, _ = address_table([p], [g], [m], [p])
    blocks = block_table((first + n,), DEVICE)
    assert blocks.sizes[0] == first + n and len(blocks.tensor_of_block) == first // n + 1
    kernel._step_block[(1,)](
        table - 4 * first,
        table,
        blocks.sizes,
        blocks.first_blocks - first // n,
        blocks.tensor_of_block[-1:],
        torch.tensor([2.0], device=DEVICE),
        *(0.1, 0.1, 0.9, 0.1, 1),
        *(kernel._DTYPES[FP32],) * 3,
        HAS_M=True,
        NESTEROV=False,
        LR_ON_DEVICE=False,
        STOCHASTIC_P=False,
        STOCHASTIC_M=False,
        KAHAN=False,
        ALIGNED=True,
        BLOCK=TABLE_BLOCK,
    )
    torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinities_stay_what_they_are(kernel, value):
    p = torch.tensor([value, 1.0], device=DEVICE).to(BF16)
    zeros = torch.zeros_like(p)
    kernel.step_by_triton([p], [zeros], [zeros.clone()], [1.0], **options_of(), keys=[1], stochastic_p=True)
    assert p[0] == value


def test_every_nan_stays_nan(kernel):
    "The nan that a GPU makes has all bits set but the sign's, so that adding noise to them would make a number of it."
    p = torch.ones(64, dtype=BF16, device=DEVICE)
    g = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32, device=DEVICE).view(FP32)
    kernel.step_by_triton([p], [g], [None], [1.0], **options_of(mu=0.0), keys=[1], stochastic_p=True)
    assert p.isnan().all()


def trained(steps=4, dtype=FP32, shapes=((33, 20), (7,), (), (0, 3), (65, 70)), **options):
    "Parameters and optimizer after steps with fixed gradients."
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]
    opt = SGDSaI(params, lr=0.02, weight_decay=0.1, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, device=DEVICE).to(dtype)
        opt.step()
    return params, opt


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"maximize": True, "momentum": 0.0}, {"normalize": True}])
def test_an_optimizer_that_takes_it_steps_as_one_that_does_not(triton_on_cpu, kernel, monkeypatch, dtype, options):
    expected, _ = trained(dtype=dtype, foreach=False, **options)
    calls, step = [], kernel.step_by_triton
    monkeypatch.setattr(kernel, "step_by_triton", lambda *a, **k: calls.append(step(*a, **k)))
    actual, _ = trained(dtype=dtype, fused=True, **options)
    assert len(calls) == 4
    tolerance = dict(rtol=2e-3, atol=1e-3) if dtype == FP16 else {}  # one rounding
    torch.testing.assert_close(actual, expected, **tolerance)


def test_lr_and_scales_that_live_on_the_device(triton_on_cpu):
    expected, _ = trained(foreach=False)
    torch.manual_seed(1)
    lr = torch.tensor(0.02, device=DEVICE)
    actual, opt = trained(fused=True, capturable=True)
    assert isinstance(opt.state[actual[0]]["gsnr"], torch.Tensor)
    torch.testing.assert_close(actual, expected)
    again = copy.deepcopy(opt)
    again.param_groups[0]["lr"] = lr
    for p in again.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    again.step()
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    torch.testing.assert_close(again.param_groups[0]["params"], opt.param_groups[0]["params"])


@pytest.mark.parametrize("rounding, state_dtype", [("stochastic", None), ("kahan", None), (None, BF16)])
def test_rounded_steps_keep_the_same_state(triton_on_cpu, rounding, state_dtype):
    "The noise of stochastic rounding is another one, so single entries differ, and the mean over many does not."
    dtype = FP32 if state_dtype else BF16
    how = dict(dtype=dtype, rounding=rounding, state_dtype=state_dtype, shapes=((50, 80),), steps=6)
    (expected,), slow = trained(**how)
    (actual,), fast = trained(fused=True, **how)
    slow_state, fast_state = slow.state[expected], fast.state[actual]
    assert slow_state.keys() == fast_state.keys()
    assert fast_state.get("step", 6) == slow_state.get("step", 6) == 6
    assert fast_state["momentum_buffer"].dtype == slow_state["momentum_buffer"].dtype
    difference = (actual - expected).detach().float()
    if rounding == "kahan":
        assert (difference != 0).float().mean() < 0.01  # where float32 rounded another way
    else:
        assert (difference != 0).float().mean() > 0.1  # it is rounded stochastically
    assert abs(difference.mean()) < 4 * difference.std() / difference.numel() ** 0.5
    assert difference.abs().max() < 0.5


def test_what_it_cannot_take_goes_another_way(triton_on_cpu, kernel):
    torch.manual_seed(0)
    whole = torch.randn(8, 6, device=DEVICE)
    assert kernel.fits_triton(whole, whole.clone(), None) and not kernel.fits_triton(
        whole, whole.clone().T.contiguous().T
    )
    assert not kernel.fits_triton(whole.double()) and not kernel.fits_triton(whole.to(torch.complex64))
    expected, _ = trained(dtype=torch.float64, foreach=False)
    actual, _ = trained(dtype=torch.float64, fused=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", [{"rounding": "stochastic"}, {"capturable": True}, {"state_dtype": BF16}])
def test_it_is_refused_where_there_is_no_kernel(options):
    "On the CPU `fused=True` is PyTorch's kernel, which knows none of these."
    with pytest.raises(RuntimeError, match="fused"):
        SGDSaI([torch.nn.Parameter(torch.zeros(3, device="cpu"))], fused=True, **options)


def test_int8_is_refused_everywhere(triton_on_cpu):
    with pytest.raises(RuntimeError, match="fused.*int8"):
        SGDSaI([torch.nn.Parameter(torch.zeros(3, device=DEVICE))], fused=True, state_dtype=torch.int8)


def test_tables_of_the_same_sizes_are_found_again():
    table = block_table((5, 4097), DEVICE)
    assert block_table((5, 4097), DEVICE) is table and table.tensor_of_block.tolist() == [0, 1, 1]
    x = torch.zeros(4, device=DEVICE)
    assert address_table([x])[0].tolist() == [x.data_ptr()] != address_table([x[1:]])[0].tolist()


@pytest.mark.gpu
def test_a_captured_step_replays_as_eager_steps_do():
    def made():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((300, 70), (9,), (65, 4))]
        for p in params:
            p.grad = torch.randn_like(p)
        return params, SGDSaI(params, lr=0.01, fused=True, capturable=True)

    (eager, opt), (replayed, captured) = made(), made()
    for _ in range(6):
        opt.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(replayed, eager)
