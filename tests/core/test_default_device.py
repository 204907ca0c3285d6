"""The default device and the default dtype are for the user's tensors; those of an optimizer follow its parameters.

Everything of the core runs under another default and gives the same numbers, on the device of what it was given."""

import ast
import copy
import io
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import sgd_sai
from sgd_sai import AdaHessian, Adan, MuonSaI, SGD_sai, SGDSaI, StepInBackward
from sgd_sai.gsnr import gsnr, gsnr_values, norm_mean_std
from sgd_sai.gsnr_of_models import average_gsnr, gsnr_batches, gsnr_table
from sgd_sai.internals import rounding
from sgd_sai.internals.chunks import SINGLE_CORE_MAX
from sgd_sai.scale_rules import BUILT_IN_RULES, measure_scales

FLOAT32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
SHAPES = [(30, 20), (7,), (7,), (), (1,), (4, 3, 3, 3), (SINGLE_CORE_MAX + 5,)]  # the last one takes the fused kernel


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


OTHER_DEFAULTS = {
    "device meta": lambda: default_device("meta"),
    "dtype float64": lambda: default_dtype(torch.float64),
}
under_other_defaults = pytest.mark.parametrize("other", OTHER_DEFAULTS.values(), ids=OTHER_DEFAULTS)


def draws(shapes, dtype, count, seed=0):
    "Lists of normal numbers on the CPU, whatever the defaults are."
    generator = torch.Generator("cpu").manual_seed(seed)
    wide = torch.complex64 if dtype.is_complex else FLOAT32
    return [
        [torch.randn(s, generator=generator, dtype=wide, device="cpu").to(dtype) for s in shapes] for _ in range(count)
    ]


def network(dtype=FLOAT32):
    "A small network with a batch, on the CPU, whatever the defaults are."
    sizes = [(8, 6), (8,), (5, 8), (5,)]
    net = nn.Sequential(*(nn.Linear(a, b, device="cpu", dtype=dtype) for a, b in ((6, 8), (8, 5))))
    for p, value in zip(net.parameters(), draws(sizes, dtype, 1)[0], strict=True):
        p.data.copy_(value)
    return net, draws([(9, 6)], dtype, 4, seed=1)


def same(found, expected, rtol=0.0):
    "Assert that two results have the same types, devices, dtypes and numbers."
    if isinstance(expected, torch.Tensor):
        assert found.device == expected.device and found.shape == expected.shape
        if rtol:
            assert (found - expected).abs().max() <= rtol * expected.abs().max()
        else:
            assert found.dtype == expected.dtype and torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            same(found[key], expected[key], rtol)
    elif isinstance(expected, (list, tuple)):
        for a, b in zip(found, expected, strict=True):
            same(a, b, rtol)
    else:
        assert type(found) is type(expected)
        assert found == expected or found == pytest.approx(expected, rel=rtol, nan_ok=True)


def assert_unmoved(run, other, monkeypatch, rtol=0.0):
    "What `run` returns is the same under the other default."
    results = []
    for context in (contextmanager(lambda: (yield)), other):
        monkeypatch.setattr(rounding, "_tables", {})  # the table of noise is made anew
        torch.manual_seed(0)
        with context():
            results.append(run())
    same(results[1], results[0], rtol)


def numbers(opt, params):
    "Parameters and state, clocks as numbers: their dtype has a test of its own."
    return [p.detach() for p in params], [
        {key: float(value) if key in getattr(opt, "SCALARS", ()) else value for key, value in opt.state[p].items()}
        for p in params
    ]


def through_file(opt, params, make):
    "Parameters and optimizer, loaded anew from a file."
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    new = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(new)
    other.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return other, new


def five_steps(make, dtype=FLOAT32, shapes=SHAPES):
    "Three steps, a journey through a file, one through a copy, and two more steps."
    params = [nn.Parameter(value) for value in draws(shapes, dtype, 1)[0]]
    opt = make(params)
    for t, grads in enumerate(draws(shapes, dtype, 5, seed=1)):
        if t == 3:
            opt, params = through_file(opt, params, make)
        if t == 4:
            opt, params = copy.deepcopy((opt, params))
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.step()
    return numbers(opt, params)


SGD_SAI = {
    "default": {},
    "forloop": dict(foreach=False, fused=False),
    "foreach": dict(foreach=True),
    "foreach, nesterov": dict(foreach=True, nesterov=True),
    "fused": dict(fused=True),
    "fused, no decay": dict(fused=True, weight_decay=0.0),
    "no momentum": dict(momentum=0.0),
    "nesterov": dict(nesterov=True, maximize=True),
    "capturable": dict(capturable=True),
    "capturable, normalize": dict(capturable=True, normalize=True),
    "normalize": dict(normalize=True),
    "control": dict(scale="sqrt_numel"),
    "rule": dict(scale=lambda grad, param: param.norm() + grad.abs().max()),
    "bf16 state": dict(state_dtype=BF16),
    "int8 state": dict(state_dtype=INT8),
    "int8 state, nearest": dict(state_dtype=INT8, rounding="nearest"),
}
FEW_BITS = {
    "bf16": {},
    "bf16, stochastic": dict(rounding="stochastic"),
    "bf16, kahan": dict(rounding="kahan"),
    "bf16, kahan, int8": dict(rounding="kahan", state_dtype=INT8),
    "bf16, float32 state": dict(state_dtype=FLOAT32),
}


@under_other_defaults
@pytest.mark.parametrize("kw", SGD_SAI.values(), ids=SGD_SAI)
def test_sgd_sai(kw, other, monkeypatch):
    assert_unmoved(lambda: five_steps(lambda params: SGDSaI(params, lr=0.01, **kw)), other, monkeypatch)


@under_other_defaults
@pytest.mark.parametrize("kw", FEW_BITS.values(), ids=FEW_BITS)
def test_sgd_sai_in_bfloat16(kw, other, monkeypatch):
    assert_unmoved(lambda: five_steps(lambda params: SGDSaI(params, lr=0.01, **kw), BF16), other, monkeypatch)


@under_other_defaults
@pytest.mark.parametrize("make", [SGDSaI, Adan], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64], ids=str)
def test_other_dtypes(make, dtype, other, monkeypatch):
    assert_unmoved(lambda: five_steps(lambda params: make(params, lr=1e-3), dtype), other, monkeypatch)


@under_other_defaults
@pytest.mark.parametrize("make", [SGDSaI, Adan], ids=lambda make: make.__name__)
@pytest.mark.parametrize("kw", [{}, dict(capturable=True), dict(foreach=True)], ids=str)
def test_learning_rate_that_is_a_tensor(make, kw, other, monkeypatch):
    lr = torch.tensor(1e-2, dtype=FLOAT32)
    rtol = 1e-6 if make is Adan and kw.get("capturable") else 0.0  # see test_adan_on_the_device
    assert_unmoved(lambda: five_steps(lambda params: make(params, lr=lr, **kw)), other, monkeypatch, rtol)


@under_other_defaults
def test_the_class_with_the_authors_signature(other, monkeypatch):
    def run():
        params = [nn.Parameter(value) for value in draws(SHAPES, FLOAT32, 1)[0]]
        opt = SGD_sai(params, 0.01, 0.9, 1e-8, 0.1)
        for p, g in zip(params, draws(SHAPES, FLOAT32, 1, seed=1)[0], strict=True):
            p.grad = g
        opt.warmup_step()
        opt.step()
        return numbers(opt, params), opt.scales()

    assert_unmoved(run, other, monkeypatch)


ADAN = {
    "default": {},
    "forloop": dict(foreach=False),
    "foreach": dict(foreach=True),
    "no prox": dict(no_prox=True, maximize=True),
    "restarts": dict(restart_radius=0.05),
    "bf16 state": dict(state_dtype=BF16),
}


@under_other_defaults
@pytest.mark.parametrize("kw", ADAN.values(), ids=ADAN)
def test_adan(kw, other, monkeypatch):
    assert_unmoved(lambda: five_steps(lambda params: Adan(params, weight_decay=0.1, **kw)), other, monkeypatch)


@under_other_defaults
@pytest.mark.parametrize("kw", [{}, dict(restart_radius=0.05), dict(foreach=False)], ids=str)
def test_adan_on_the_device(kw, other, monkeypatch):
    "Under another default dtype its clocks have another precision, and so have the corrections made from them."
    rtol = 1e-6 if other is OTHER_DEFAULTS["dtype float64"] else 0.0
    assert_unmoved(lambda: five_steps(lambda params: Adan(params, capturable=True, **kw)), other, monkeypatch, rtol)


def one_step(optimizer, **kw):
    "An optimizer of that class after a step, and its parameter."
    p = nn.Parameter(torch.ones(3, dtype=FLOAT32, device="cpu"))
    opt = optimizer([p], **kw)
    p.square().sum().backward(create_graph=optimizer is AdaHessian)
    opt.step()
    p.grad = None
    return opt, p


@pytest.mark.parametrize("dtype", [FLOAT32, torch.float64], ids=str)
@pytest.mark.parametrize("make, kw", [(Adan, {}), (Adan, dict(capturable=True)), (AdaHessian, {})], ids=str)
def test_clocks_have_the_dtype_that_pytorch_gives_its_own(make, kw, dtype):
    "As `torch.optim.AdamW`: float64 where that is the default, float32 otherwise, also where a file has been loaded."
    with default_dtype(dtype):
        theirs, q = one_step(torch.optim.AdamW)
        ours, p = one_step(make, **kw)
        assert ours.state[p]["step"].dtype == theirs.state[q]["step"].dtype == dtype
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        assert ours.state[p]["step"].dtype == dtype and ours.state[p]["step"] == 1


@under_other_defaults
@pytest.mark.parametrize(
    "kw",
    [
        *({}, dict(capturable=True), dict(state_dtype=torch.int8), dict(state_dtype=torch.bfloat16)),
        *(dict(rest=rest) for rest in ("sign", "row_norm", "adams")),
        *(dict(rest=rest, state_dtype=torch.int8) for rest in ("sign", "row_norm", "adams")),
    ],
    ids=str,
)
def test_muon_sai(kw, other, monkeypatch):
    def run():
        net, batches = network()
        groups = [
            {"params": [p for p in net.parameters() if (p.ndim > 1) == muon], "muon": muon} for muon in (True, False)
        ]
        opt = MuonSaI(groups, **kw)
        for (x,) in batches:
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
        return numbers(opt, list(net.parameters())), opt.scales()

    assert_unmoved(run, other, monkeypatch)


@under_other_defaults
def test_adahessian(other, monkeypatch):
    def run():
        net, batches = network()
        opt = AdaHessian(net.parameters())
        for (x,) in batches:
            opt.zero_grad()
            net(x).square().mean().backward(create_graph=True)
            opt.step()
        return numbers(opt, list(net.parameters()))

    assert_unmoved(run, other, monkeypatch)


@under_other_defaults
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_steps_inside_the_backward_pass(max_norm, other, monkeypatch):
    def run():
        net, batches = network()
        opt = SGDSaI(net.named_parameters())
        inside = StepInBackward(opt, max_norm=max_norm)
        norms = [inside.backward(net(x).square().mean()) for (x,) in batches]
        return numbers(opt, list(net.parameters())), [x for x in norms if x is not None]

    assert_unmoved(run, other, monkeypatch)


GRADIENTS = {
    "small": [(2,), (5,), (5,), (768,), (768,)],
    "rows": [(4096,), (100, 100)],
    "odd": [(), (1,), (0,)],
    "several blocks": [((1 << 20) + 3,)],
}


@under_other_defaults
@pytest.mark.parametrize("dtype", [FLOAT32, torch.float64, BF16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("shapes", GRADIENTS.values(), ids=GRADIENTS)
def test_statistics_of_gradients(shapes, dtype, other, monkeypatch):
    "On the device of the gradients, with the precision of the documentation."
    (grads,) = draws(shapes, dtype, 1)
    grads += [torch.full_like(grads[0], 0.1), torch.zeros_like(grads[0])]  # nearly cancels; has no scale

    def run():
        found = [gsnr(g) for g in grads], [norm_mean_std(g) for g in grads], gsnr_values(grads), gsnr_values([])
        assert {G.dtype for G in found[0]} == {torch.float64 if dtype == torch.float64 else FLOAT32}
        return found

    assert_unmoved(run, other, monkeypatch)


@under_other_defaults
@pytest.mark.parametrize(
    "rule",
    [*sorted(BUILT_IN_RULES), lambda grad, param: grad.norm() + param.norm()],
    ids=[*sorted(BUILT_IN_RULES), "a function"],
)
def test_rules_of_the_scale(rule, other, monkeypatch):
    shapes = [s for shapes in GRADIENTS.values() for s in shapes]
    grads, params = draws(shapes, FLOAT32, 2)
    grads[0], grads[1] = grads[0] * 1e-30, grads[1] * 1e30  # squares that leave the range of float32
    grads[2] = torch.zeros_like(grads[2])
    assert_unmoved(lambda: measure_scales(grads, rule, params=params), other, monkeypatch)


@under_other_defaults
def test_tables_of_a_model(other, monkeypatch):
    def loss_fn(model, batch):
        return nn.functional.dropout(model(batch[0]), 0.5).square().mean()

    def run():
        net, batches = network()
        tables = gsnr_batches(net, loss_fn, batches)
        loss_fn(net, batches[0]).backward()
        rows = [gsnr_table(net), average_gsnr(tables), *tables]
        return [[tuple(row) for row in table] for table in rows]

    assert_unmoved(run, other, monkeypatch)


FACTORIES = set(
    "Generator as_tensor asarray tensor scalar_tensor zeros ones full empty empty_strided arange linspace eye "
    "rand randn randint randperm".split()
)
CORE = [path for folder in (".", "internals") for path in sorted((Path(sgd_sai.__file__).parent / folder).glob("*.py"))]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_every_tensor_and_generator_that_is_made_says_its_device(path):
    "Also where no test comes by: `torch.zeros(3)` without a device follows the default."
    silent = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
            continue
        name = node.func.attr
        named = any(keyword.arg == "device" for keyword in node.keywords) or name == "Generator" and node.args
        if name in FACTORIES and not named:
            silent.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not silent
