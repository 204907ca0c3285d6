"Fast forms of the rules for the rest: equal to the reference in every form, small in memory, right in fewer bits."

import math
import shutil

import pytest
import torch
from common import LAYOUTS, param, peak_of_new_memory, steps, twin
from rest_optimizer import RULES, RestOptimizer, reference_steps, with_absent_rows
from torch import nn

from sgd_sai import rest_kernels
from sgd_sai.internals import chunks as chunks_module
from sgd_sai.internals import rounding as rounding_module
from sgd_sai.internals.rounding import decode_momentum, step_rounded, update_momentum, zero_momentum

pytestmark = pytest.mark.usefixtures("seeded")
FLOAT32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
SHAPES = [(7,), (33, 20), (4, 3, 5, 5), (), (1,), (90, 70), (5, 1, 3), (257,)]
each_rule = pytest.mark.parametrize("rest, nesterov", RULES)


@pytest.fixture
def small_chunks(monkeypatch):
    "Chunks of which the tensors of the tests have many."
    monkeypatch.setattr(chunks_module, "FP32_CHUNK", 512)
    monkeypatch.setattr(rounding_module, "FP32_CHUNK", 512)


def gradients(shapes, n=20):
    "Gradients with absent rows, and with rows of sizes from 1e-3 to 1, of which the small ones are below the floor."
    return [[with_absent_rows(torch.randn(s)) * sizes_of_rows(s) for s in shapes] for _ in range(n)]


def sizes_of_rows(shape):
    sizes = torch.ones(shape)
    for d, n in enumerate(shape[:2]):
        sizes *= (10 ** torch.linspace(-3, 0, n)).view([n if i == d else 1 for i in range(len(shape))])
    return sizes


def largest_difference(mine, theirs):
    "Of the entries of two lists of tensors, relative to the largest entry of each tensor or to 1."
    pairs = zip(mine, theirs, strict=True)
    return max(((p - q).abs().max() / q.abs().max().clamp_min(1)).item() for p, q in pairs if q.numel())


def assert_like_reference(opt, params, grads, **settings):
    "The steps of `grads` give parameters and momenta of the reference, to 1e-6."
    start = [p.detach().clone() for p in params]
    expected, momenta = reference_steps(start, grads, **settings)
    steps(opt, params, *grads)
    assert largest_difference([p.detach() for p in params], expected) <= 1e-6
    assert largest_difference([opt.state[p]["momentum_buffer"] for p in params], momenta) <= 1e-6
    assert all(not torch.equal(p, q) for p, q in zip(params, start, strict=True) if p.numel())


@each_rule
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("changes", [{}, dict(maximize=True), dict(weight_decay=0.0), dict(momentum=0.0)], ids=str)
def test_each_form_is_the_reference(rest, nesterov, foreach, changes, small_chunks):
    settings = dict(rest=rest, nesterov=nesterov) | changes
    params = [param(*s) for s in SHAPES]
    opt = RestOptimizer(params, foreach=foreach, **settings)
    assert_like_reference(opt, params, gradients(SHAPES), **settings)


@each_rule
@pytest.mark.parametrize("layout", [dict(stacked=True), dict(transposed=True), dict(stacked=True, transposed=True)])
def test_each_layout_of_rows_is_the_reference(rest, nesterov, layout, small_chunks):
    shapes = [(33, 20), (4, 30, 20), (6,), (2, 3, 10, 20)]
    params, settings = [param(*s) for s in shapes], dict(rest=rest, nesterov=nesterov) | layout
    assert_like_reference(RestOptimizer(params, **settings), params, gradients(shapes), **settings)


@each_rule
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_memory_layout_is_the_reference(rest, nesterov, name, small_chunks):
    of_param, of_grad = LAYOUTS[name]
    p, settings = nn.Parameter(of_param(torch.randn(12, 6, 9, 5))), dict(rest=rest, nesterov=nesterov)
    opt, start = RestOptimizer([p], **settings), p.detach().clone()
    grads = gradients([p.shape])
    expected, _ = reference_steps([start], grads, **settings)
    for (g,) in grads:
        p.grad = of_grad(g)
        opt.step()
    assert largest_difference([p.detach()], expected) <= 1e-6


@each_rule
@pytest.mark.parametrize("shape", [(400_000,), (1000, 700), (2, 300_000), (700, 1000)], ids=str)
def test_large_tensors_are_the_reference(rest, nesterov, shape):
    params, settings = [param(*shape)], dict(rest=rest, nesterov=nesterov, transposed=shape == (700, 1000))
    assert_like_reference(RestOptimizer(params, **settings), params, gradients([shape], 4), **settings)


@each_rule
@pytest.mark.parametrize("foreach", [None, False])
def test_many_small_tensors_are_the_reference(rest, nesterov, foreach):
    shapes = [(n % 13 + 1,) if n % 3 else (n % 7 + 1, 5) for n in range(200)]
    params, settings = [param(*s) for s in shapes], dict(rest=rest, nesterov=nesterov)
    assert_like_reference(RestOptimizer(params, foreach=foreach, **settings), params, gradients(shapes, 5), **settings)


@each_rule
def test_double_precision_is_the_reference(rest, nesterov, small_chunks):
    params, settings = [param(*s, dtype=torch.float64) for s in SHAPES], dict(rest=rest, nesterov=nesterov)
    grads = [[g.double() for g in gs] for gs in gradients(SHAPES)]
    start = [p.detach().clone() for p in params]
    expected, _ = reference_steps(start, grads, **settings)
    steps(RestOptimizer(params, **settings), params, *grads)
    assert largest_difference([p.detach() for p in params], expected) <= 1e-13


@each_rule
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_sixteen_bits_are_computed_in_float32_and_rounded_once(rest, nesterov, dtype, small_chunks):
    params, settings = [param(*s, dtype=dtype) for s in SHAPES], dict(rest=rest, nesterov=nesterov)
    grads = [[g.to(dtype) for g in gs] for gs in gradients(SHAPES)]
    expected, momenta = reference_steps([p.detach().clone() for p in params], grads, dtype=FLOAT32, **settings)
    opt = RestOptimizer(params, **settings)
    steps(opt, params, *grads)
    mine = [opt.state[p]["momentum_buffer"] for p in params]
    for ours, theirs in ((params, expected), (mine, momenta)):
        off = torch.cat([(a != b).flatten() for a, b in zip(ours, theirs, strict=True)]).double().mean()
        assert off < 1e-3  # a number in the middle of two may be rounded to the other one
    assert largest_difference([p.detach().float() for p in params], [q.float() for q in expected]) < 0.01


def test_complex_parameters_step_as_pairs_of_real_ones():
    for rest in ("sign", "adams"):
        p = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))
        q = nn.Parameter(torch.view_as_real(p.detach()).clone())
        grads = [torch.randn(5, 4, dtype=torch.complex64) for _ in range(5)]
        others = [param(3, dtype=torch.complex64) for _ in range(2)]
        steps(RestOptimizer([p, *others], rest=rest), [p, *others], *[[g, None, None] for g in grads])
        steps(RestOptimizer([q], rest=rest), [q], *[[torch.view_as_real(g)] for g in grads])
        assert torch.equal(torch.view_as_real(p.detach()), q)
    with pytest.raises(ValueError, match="complex"):
        RestOptimizer([p], rest="row_norm")


@each_rule
def test_tensors_without_entries_and_gradients_of_zeros(rest, nesterov):
    params = [param(0, 3), param(3, 0), param(4, 3), param(4)]
    before = [p.detach().clone() for p in params]
    opt = RestOptimizer(params, rest=rest, nesterov=nesterov, weight_decay=0.5)
    steps(opt, params, *[[torch.zeros_like(p) for p in params]] * 3)
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old * 0.99**3)
        assert opt.state[p]["momentum_buffer"].shape == p.shape


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("dtype, options", [(FLOAT32, {}), (BF16, {}), (BF16, dict(rounding="kahan"))])
def test_absent_rows_do_not_move(foreach, dtype, options):
    params = [param(50, 8, dtype=dtype), param(8, dtype=dtype), param(9, dtype=dtype)]
    opt = RestOptimizer(params, rest="row_norm", nesterov=True, weight_decay=0.0, foreach=foreach, **options)
    for t in range(5):
        before = [p.detach().clone() for p in params]
        gs = [torch.randn(p.shape).to(dtype) for p in params]
        if t:
            gs[0][10:20] = 0
            gs[1].zero_()
        steps(opt, params, gs)
        same = (params[0] == before[0]).all(1)
        assert same[10:20].all() == (t > 0) and not same[20:].any() and torch.equal(params[1], before[1]) == (t > 0)
    assert opt.state[params[0]]["momentum_buffer"][10:20].any()


@pytest.mark.parametrize("size", [1e-30, 1e25])
@pytest.mark.parametrize("foreach", [None, False])
def test_rows_of_any_size_step_alike(size, foreach, small_chunks):
    shapes = [(60, 40), (77,), (5,)]
    start, grads, ends = [torch.randn(s) for s in shapes], gradients(shapes, 5), []
    for factor in (1.0, size):
        params = [nn.Parameter(t.clone()) for t in start]
        opt = RestOptimizer(params, rest="row_norm", nesterov=True, foreach=foreach)
        steps(opt, params, *[[factor * g for g in gs] for gs in grads])
        ends.append([p.detach() for p in params])
    assert largest_difference(*ends) <= 1e-6


def test_momenta_have_the_dtype_that_was_asked_for():
    for rest, nesterov in RULES:
        for dtype in (FLOAT32, BF16, INT8):
            p = param(30, 20)
            opt = RestOptimizer([p], rest=rest, nesterov=nesterov, state_dtype=dtype)
            steps(opt, [p], [torch.randn(30, 20)])
            assert opt.state[p]["momentum_buffer"].dtype == dtype
            assert ("momentum_absmax" in opt.state[p]) == (dtype == INT8)


@each_rule
def test_a_rate_in_a_tensor_is_that_rate(rest, nesterov):
    start, grads = [torch.randn(s) for s in SHAPES], gradients(SHAPES, 5)
    for capturable in (False, True):
        for foreach in (None, False):
            ends = []
            for lr in (0.02, torch.tensor(0.02)):
                params = [nn.Parameter(t.clone()) for t in start]
                settings = dict(rest=rest, nesterov=nesterov, foreach=foreach, lr_factor=0.5)
                steps(RestOptimizer(params, lr=lr, capturable=capturable, **settings), params, *grads)
                ends.append([p.detach() for p in params])
            assert largest_difference(*ends) <= 1e-6
    expected, _ = reference_steps(start, grads, lr=0.01, rest=rest, nesterov=nesterov)
    assert largest_difference(ends[0], expected) <= 1e-6


@each_rule
def test_a_rate_on_the_device_is_never_read(rest, nesterov, monkeypatch):
    params = [param(*s) for s in SHAPES]
    opt = RestOptimizer(params, lr=torch.tensor(0.02), capturable=True, rest=rest, nesterov=nesterov)
    for read in ("item", "tolist", "__bool__", "__float__"):
        monkeypatch.setattr(torch.Tensor, read, lambda *_: pytest.fail("a number was read from a tensor"))
    steps(opt, params, *gradients(SHAPES, 2))


def test_a_rate_of_zero_moves_nothing():
    for rest, nesterov in RULES:
        for lr in (0.0, torch.tensor(0.0)):
            params = [param(*s) for s in SHAPES]
            before = [p.detach().clone() for p in params]
            opt = RestOptimizer(params, lr=lr, capturable=True, rest=rest, nesterov=nesterov)
            steps(opt, params, *gradients(SHAPES, 2))
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@each_rule
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_allocates_a_few_chunks(rest, nesterov, foreach, transposed):
    params = [param(3000, 2000), param(2_000_000), *(param(100) for _ in range(50))]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = RestOptimizer(params, rest=rest, nesterov=nesterov, foreach=foreach, transposed=transposed)
    opt.step()
    peak = peak_of_new_memory(opt.step)
    rows = 16 * (2000 if transposed else 3000) * 4
    assert peak <= 2.1 * 4 * chunks_module.FP32_CHUNK + rows < 0.05 * 4 * sum(p.numel() for p in params)


@each_rule
def test_a_sixteen_bit_step_allocates_a_few_chunks(rest, nesterov):
    p = param(3000, 2000, dtype=BF16)
    p.grad = torch.randn_like(p)
    opt = RestOptimizer([p], rest=rest, nesterov=nesterov)
    opt.step()
    assert peak_of_new_memory(opt.step) <= 6.1 * 4 * chunks_module.FP32_CHUNK + 16 * 3000 * 4


def test_gradients_are_left_alone_and_all_groups_step():
    params = [param(20, 30), param(20, 30), param(5), param(20, 30)]
    groups = [
        dict(params=[params[0]], rest="row_norm", nesterov=True),
        dict(params=[params[1], params[2]], rest="sign", lr=0.5),
        dict(params=[params[3]], rest="adams", weight_decay=0.0),
    ]
    opt, grads = RestOptimizer(groups), gradients([p.shape for p in params], 3)
    start = [p.detach().clone() for p in params]
    for gs in grads:
        for p, g in zip(params, gs, strict=True):
            p.grad = g.clone()
        opt.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, gs, strict=True))
    for i, settings in enumerate(
        [
            dict(rest="row_norm", nesterov=True),
            dict(rest="sign", lr=0.5),
            dict(rest="sign", lr=0.5),
            dict(rest="adams", weight_decay=0.0),
        ]
    ):
        expected, _ = reference_steps([start[i]], [[gs[i]] for gs in grads], **settings)
        assert largest_difference([params[i].detach()], expected) <= 1e-6


def test_a_gradient_of_another_shape_is_an_error_before_anything_is_changed():
    params = [param(4, 3), param(4, 3)]
    opt = RestOptimizer(params, rest="row_norm")
    steps(opt, params, *gradients([(4, 3)] * 2, 1))
    before = [p.detach().clone() for p in params]
    opt.state[params[1]]["momentum_buffer"] = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="#1 of group 0"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


# --- fewer bits -----------------------------------------------------------------------------------------------------

FORMS = {
    "bf16 state": (FLOAT32, dict(state_dtype=BF16)),
    "int8 state": (FLOAT32, dict(state_dtype=INT8)),
    "bf16, int8 state": (BF16, dict(state_dtype=INT8, rounding="stochastic")),
    "stochastic": (BF16, dict(rounding="stochastic")),
    "kahan": (BF16, dict(rounding="kahan")),
    "kahan, int8 state": (BF16, dict(rounding="kahan", state_dtype=INT8)),
    "nearest": (FLOAT32, dict(state_dtype=BF16, rounding="nearest")),
    "int8 to nearest": (FLOAT32, dict(state_dtype=INT8, rounding="nearest")),
}


@each_rule
@pytest.mark.parametrize("dtype, options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["channels_last", "gradient laid out otherwise"])
def test_close_to_float32_in_fewer_bits(rest, nesterov, dtype, options, name, small_chunks):
    of_param, of_grad = LAYOUTS[name]
    p = nn.Parameter(of_param(torch.randn(40, 12, 3, 3).to(dtype)))
    settings = dict(rest=rest, nesterov=nesterov, weight_decay=0.0, lr=2e-3)
    opt, start, grads = RestOptimizer([p], **settings, **options), p.detach().double(), []
    for _ in range(40):
        g = torch.randn(40, 12, 3, 3).to(dtype) + 0.5
        p.grad = of_grad(g)
        grads.append([g.double()])
        opt.step()
    (exact,), _ = reference_steps([start], grads, **settings)
    end = p.detach().double() + opt.state[p].get("compensation", 0.0)
    # rounding a momentum may turn the signs of entries near zero
    allowed = 0.3 if dtype == BF16 and "kahan" not in options.values() else 0.06
    assert (end - exact).norm() < allowed * (exact - start).norm()


@pytest.mark.parametrize("layout", [dict(stacked=True), dict(transposed=True), dict(stacked=True, transposed=True)])
def test_rows_of_each_layout_in_fewer_bits(layout):
    "Compensated parameters with momenta in float32 end where the reference does."
    p, settings = param(3, 12, 20, dtype=BF16), dict(rest="row_norm", nesterov=True) | layout
    opt, start = RestOptimizer([p], rounding="kahan", state_dtype=FLOAT32, **settings), p.detach().double()
    grads = [[g.to(BF16)] for (g,) in gradients([p.shape], 5)]
    steps(opt, [p], *grads)
    (exact,), _ = reference_steps([start], [[g.double()] for (g,) in grads], **settings)
    end = p.detach().double() + opt.state[p]["compensation"]
    assert (end - exact).norm() < 1e-3 * (exact - start).norm()


@each_rule
@pytest.mark.parametrize("rounding, expected", [("stochastic", 1.0), ("kahan", 1.0), (None, 0.0)])
def test_small_steps_arrive_where_they_are_not_rounded_away(rest, nesterov, rounding, expected):
    p = nn.Parameter(torch.ones(64, 64, dtype=BF16))
    opt = RestOptimizer([p], rest=rest, nesterov=nesterov, lr=2e-5, weight_decay=0.0, momentum=0.5, rounding=rounding)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        opt.step()
    moved = 1 - (p.double() + opt.state[p].get("compensation", torch.zeros(()))).mean().item()
    assert moved == pytest.approx(expected * 200 * 2e-5, rel=0.06, abs=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("m_dtype", [FLOAT32, BF16, INT8], ids=str)
def test_an_update_as_a_whole_is_momentum_or_its_form_by_nesterov(m_dtype, nesterov, small_chunks):
    g, m = torch.randn(40, 30), torch.zeros(40, 30, dtype=torch.float64)
    state = zero_momentum(g, g, m_dtype) | {"step": 0}
    for _ in range(30):
        g = torch.randn(40, 30)
        m = m.lerp(g.double(), 0.1)
        u = update_momentum(g, state, 0.9, nesterov, 0, stochastic=m_dtype != FLOAT32)
        state["step"] += 1
    exact = g.double().lerp(m, 0.9) if nesterov else m
    stored = decode_momentum(state, FLOAT32) if m_dtype == INT8 else state["momentum_buffer"]
    allowed = {FLOAT32: 1e-6, BF16: 0.02, INT8: 0.05}[m_dtype]
    assert u.dtype == FLOAT32 and u.shape == g.shape and (u - exact).norm() < allowed * exact.norm()
    assert (stored.double() - m).norm() < allowed * m.norm()


@pytest.mark.parametrize("m_dtype", [BF16, INT8], ids=str)
def test_an_update_as_a_whole_is_not_rounded(m_dtype):
    g = torch.randn(40, 30)
    for nesterov in (False, True):
        u = update_momentum(g, zero_momentum(g, g, m_dtype) | {"step": 0}, 0.9, nesterov, 0, stochastic=True)
        torch.testing.assert_close(u, g * (0.9 * 0.1 + 0.1 if nesterov else 0.1))


def test_an_update_as_a_whole_counts_no_step_and_takes_the_noise_of_the_next():
    g = torch.randn(60, 50)
    for stochastic in (False, True):
        whole, at_once = ({"step": 4} | zero_momentum(g, g, BF16) for _ in range(2))
        update_momentum(g, whole, 0.9, False, 3, stochastic)
        step_rounded(lambda p, g, m: m.lerp_(g, 1 - 0.9), torch.zeros(60, 50), g, at_once, 3, False, stochastic)
        assert whole["step"] == 4 and at_once["step"] == 5
        assert torch.equal(whole["momentum_buffer"], at_once["momentum_buffer"])


def test_an_update_as_a_whole_allocates_itself_and_a_few_chunks():
    g = torch.randn(3000, 2000)
    for m_dtype in (BF16, INT8):
        state = zero_momentum(g, g, m_dtype) | {"step": 0}
        update_momentum(g, state, 0.9, True, 0, True)
        peak = peak_of_new_memory(lambda state=state: update_momentum(g, state, 0.9, True, 0, True))
        assert peak < 4 * g.numel() + 8 * 4 * rounding_module.FP32_CHUNK


@each_rule
def test_parameters_of_one_shape_do_not_share_their_noise(rest, nesterov):
    params = [nn.Parameter(torch.zeros(64, 64, dtype=BF16)) for _ in range(2)]
    g = torch.randn(64, 64).bfloat16()
    opt = RestOptimizer(params, rest=rest, nesterov=nesterov, weight_decay=0.0, lr=1e-3, rounding="stochastic")
    steps(opt, params, [g, g])
    assert not torch.equal(*params) and [opt.state[p]["step"] for p in params] == [1, 1]


class Quantized(torch.Tensor):
    "A tensor that stores itself in its own format and cannot be changed in place, but for copy_."

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values):
        self.values = values

    def __tensor_flatten__(self):
        return ["values"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "copy_":
            args[0].values.copy_(args[1].to(torch.float16))
            return args[0]
        if name == "detach":
            return cls(args[0].values)
        if name == "mul":
            return args[0].values.float() * args[1]
        raise NotImplementedError(f"a quantized tensor has no {name}")


@each_rule
def test_quantized_subclasses_step_as_a_copy_that_is_written_back(rest, nesterov):
    values, g = torch.randn(6, 8).half(), torch.randn(6, 8)
    p, q = nn.Parameter(Quantized(values.clone())), nn.Parameter(values.float())
    for parameter in (p, q):
        opt = RestOptimizer([parameter], rest=rest, nesterov=nesterov)
        rest_kernels.step_rest(opt, [(opt.param_groups[0], [(parameter, g, None)])])
        assert opt.state[parameter]["momentum_buffer"].dtype == FLOAT32
    assert torch.equal(p.values, q.detach().half()) and not torch.equal(p.values, values)


# --- the compiler ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the compiler needs a C++ compiler")
@each_rule
@pytest.mark.parametrize("in_tensor", [False, True])
def test_compiled_without_breaks_and_like_the_reference(rest, nesterov, in_tensor):
    "By the real compiler, the twenty steps of the other forms."
    import torch._dynamo
    import torch._inductor.metrics as metrics

    params = [param(40, 30), param(16, 3, 3, 3), param(77), param(5)]
    settings = dict(rest=rest, nesterov=nesterov)
    opt = RestOptimizer(params, lr=torch.tensor(0.02) if in_tensor else 0.02, **settings)
    torch._dynamo.reset()
    metrics.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(opt.step)
    start, grads = [p.detach().clone() for p in params], gradients([p.shape for p in params])
    for t, gs in enumerate(grads):
        for p, g in zip(params, gs, strict=True):
            p.grad = g.clone() if p.grad is None else p.grad.copy_(g)
        (opt.step if t == 0 else compiled)()  # the first step makes the momenta
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    if rest != "row_norm":
        assert metrics.generated_kernel_count == len(params)
    expected, momenta = reference_steps(start, grads, **settings)
    assert largest_difference([p.detach() for p in params], expected) <= 1e-6
    assert largest_difference([opt.state[p]["momentum_buffer"] for p in params], momenta) <= 1e-6


def test_the_first_step_can_be_compiled_too():
    p, q = param(30, 20), None
    q, g = twin(p), torch.randn(30, 20)
    torch._dynamo.reset()
    for parameter, compiled in ((p, False), (q, True)):
        opt = RestOptimizer([parameter], rest="row_norm")
        parameter.grad = g.clone()
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        step()
        step()
    torch.testing.assert_close(p, q)


@pytest.mark.gpu
@each_rule
@pytest.mark.parametrize("foreach", [None, True, False])
def test_on_a_gpu(rest, nesterov, foreach):
    shapes = [*SHAPES, (3000, 2000)]
    start, grads = [torch.randn(s) for s in shapes], gradients(shapes, 5)
    params = [nn.Parameter(t.cuda()) for t in start]
    lr = torch.tensor(0.02, device="cuda")
    opt = RestOptimizer(params, lr=lr, capturable=True, rest=rest, nesterov=nesterov, foreach=foreach)
    steps(opt, params, *[[g.cuda() for g in gs] for gs in grads])
    expected, _ = reference_steps(start, grads, rest=rest, nesterov=nesterov)
    close = [(p.detach().cpu() - q).abs() <= 1e-5 for p, q in zip(params, expected, strict=True)]
    assert torch.cat([t.flatten() for t in close]).double().mean() > 1 - 1e-5  # the sign of a sum near zero
    graph, before = torch.cuda.CUDAGraph(), [p.detach().clone() for p in params]
    with torch.cuda.graph(graph):
        opt.step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(math.isfinite(p.sum().item()) and not torch.equal(p, q) for p, q in zip(params, before, strict=True))
