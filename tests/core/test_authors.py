"""SGDSaI and SGD_sai beside the authors' package 1.0.3 and beside torch.optim.SGD, and what a step must leave alone:
stdout, gradients, memory.

"Equal to 1e-6" means, tensor by tensor, max|p - q| <= 1e-6 max|q|, where q is computed by the other code in float64
from the same float32 gradients: in float32 its own rounding over twenty steps is of that size.
"""

import io

import pytest
import torch
from common import (
    LAYOUTS,
    ConvNet,
    TransformerBlock,
    assert_same_path,
    recorded_gradients,
    same_start,
    train,
)
from torch import nn
from torch.optim import SGD
from torch.optim.sgd import sgd

import sgd_sai.kernels
from sgd_sai.benchmarks.step_time import allocated_peak
from sgd_sai.experiments.peers import authors_sgd_sai
from sgd_sai.gsnr import gsnr
from sgd_sai.internals.chunks import FP32_CHUNK
from sgd_sai.scale_rules import measure_scales
from sgd_sai.sgd_sai import SGD_sai, SGDSaI

pytestmark = pytest.mark.usefixtures("kernels_for_small_tensors_too")
SETTINGS = dict(lr=1e-2, momentum=0.9, weight_decay=0.05)
OURS = {
    "forloop": lambda params, **kw: SGDSaI(params, **kw, foreach=False, fused=False),
    "foreach": lambda params, **kw: SGDSaI(params, **kw, foreach=True),
    "fused": lambda params, **kw: SGDSaI(params, **kw, fused=True),
    "default": SGDSaI,
    "capturable": lambda params, **kw: SGDSaI(params, **kw, capturable=True),
    "SGD_sai": SGD_sai,
}
each_of_ours = pytest.mark.parametrize("ours", OURS.values(), ids=OURS)


@pytest.fixture(params=[ConvNet, TransformerBlock])
def task(request):
    "A model class and the gradients of 20 steps of training it."
    return request.param, recorded_gradients(request.param)


@pytest.fixture(scope="module")
def Authors():
    return authors_sgd_sai()


@each_of_ours
def test_twenty_steps_equal_the_authors(Authors, task, ours):
    model_class, grads = task
    model, other = same_start(model_class), same_start(model_class).double()
    opt, reference = ours(model.parameters(), **SETTINGS), Authors(other.parameters(), **SETTINGS)
    theirs = train(other, reference.step, grads)
    assert_same_path(train(model, opt.step, grads), theirs)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert float(opt.state[p]["gsnr"]) == pytest.approx(reference.state[q]["gsnr"].item(), rel=1e-6)
        torch.testing.assert_close(
            opt.state[p]["momentum_buffer"],
            reference.state[q]["momentum_buffer"],
            check_dtype=False,
            rtol=1e-4,
            atol=1e-6,
        )


class TorchSGD:
    "The same method from torch.optim.SGD: a group for each tensor, with lr*G, and the decay before its step."

    def __init__(self, params, lr, momentum, weight_decay, **flags):
        self.params, self.decay, self.opt = list(params), 1 - lr * weight_decay, None
        self.lr, self.momentum, self.flags = lr, momentum, flags

    @torch.no_grad()
    def step(self):
        if self.opt is None:
            groups = [
                {"params": [p], "lr": self.lr * (p.grad.double().norm() / (p.grad.double().std() + 1e-8)).item()}
                for p in self.params
            ]
            self.opt = SGD(groups, momentum=self.momentum, dampening=self.momentum, **self.flags)
        for p in self.params:
            p.mul_(self.decay)
        self.opt.step()


class FunctionalSGD(TorchSGD):
    "The same through the function behind torch.optim.SGD, in its fused form."

    @torch.no_grad()
    def step(self):
        if self.opt is None:
            self.opt = [self.lr * gsnr(p.grad).item() for p in self.params], [None] * len(self.params)
        for i, (p, lr) in enumerate(zip(self.params, self.opt[0], strict=True)):
            p.mul_(self.decay)
            if self.opt[1][i] is None:
                self.opt[1][i] = p.grad.clone()
            sgd(
                [p],
                [p.grad],
                self.opt[1][i : i + 1],
                fused=True,
                weight_decay=0.0,
                momentum=self.momentum,
                lr=lr,
                dampening=self.momentum,
                nesterov=False,
                maximize=False,
            )


ORACLES = {
    "SGD forloop": lambda params: TorchSGD(params, **SETTINGS, foreach=False, fused=False),
    "SGD foreach": lambda params: TorchSGD(params, **SETTINGS, foreach=True),
    "SGD fused": lambda params: TorchSGD(params, **SETTINGS, fused=True),
    "sgd(fused=True)": lambda params: FunctionalSGD(params, **SETTINGS),
}


@pytest.fixture
def oracle_paths(task):
    model_class, grads = task
    paths = {}
    for name, oracle in ORACLES.items():
        model = same_start(model_class).double()
        paths[name] = train(model, oracle(model.parameters()).step, grads)
    return paths


@each_of_ours
def test_twenty_steps_equal_torch_sgd_with_scaled_rates(oracle_paths, task, ours):
    model_class, grads = task
    model = same_start(model_class)
    mine = train(model, ours(model.parameters(), **SETTINGS).step, grads)
    for path in oracle_paths.values():
        assert_same_path(mine, path)


def test_shortcut_for_small_tensors_makes_the_same_step(task, monkeypatch):
    model_class, grads = task
    exact = same_start(model_class).double()
    path = train(exact, OURS["forloop"](exact.parameters(), **SETTINGS).step, grads)
    for small in (0, 1 << 30):
        monkeypatch.setattr(sgd_sai.kernels, "SINGLE_CORE_MAX", small)
        model = same_start(model_class)
        assert_same_path(train(model, OURS["fused"](model.parameters(), **SETTINGS).step, grads), path)


@each_of_ours
@pytest.mark.parametrize("done", [1, 7])
def test_authors_checkpoints_continue(Authors, task, ours, done):
    model_class, grads = task
    theirs = same_start(model_class)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1]},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0, "lr": 2e-2},
    ]
    reference = Authors(groups, **SETTINGS)
    train(theirs, reference.step, grads[:done])
    file = io.BytesIO()
    torch.save({"model": theirs.state_dict(), "optimizer": reference.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    model = model_class()
    model.load_state_dict(saved["model"])
    opt = ours(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim <= 1]},
        ]
    )
    opt.load_state_dict(saved["optimizer"])
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in opt.param_groups] == [
        (1e-2, 0.9, 0.05),
        (2e-2, 0.9, 0.0),
    ]
    exact = theirs.double()  # the same parameters, so the same optimizer goes on; only its state has to follow
    for state in reference.state.values():
        state["momentum_buffer"], state["gsnr"] = state["momentum_buffer"].double(), state["gsnr"].double()
    assert_same_path(train(model, opt.step, grads[done:]), train(exact, reference.step, grads[done:]))
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        assert float(opt.state[p]["gsnr"]) == reference.state[q]["gsnr"].item()


def test_authors_spoilt_checkpoints_are_mended(Authors):
    torch.manual_seed(0)
    grads = {
        "zero": torch.zeros(4),
        "nan": torch.full((4,), torch.nan),
        "constant": torch.ones(4),
        "one": torch.ones(1),
        "good": torch.randn(4),
    }
    theirs = {name: nn.Parameter(torch.randn_like(g)) for name, g in grads.items()}
    reference = Authors(theirs.values())
    for name, p in theirs.items():
        p.grad = grads[name].clone()
    reference.step()
    ours = {name: nn.Parameter(torch.randn_like(g)) for name, g in grads.items()}
    opt = SGDSaI(ours.items())
    opt.load_state_dict(reference.state_dict())
    assert opt.scales() == {"good": pytest.approx(gsnr(grads["good"]).item(), rel=1e-6)}
    for p in ours.values():
        p.grad = torch.randn_like(p)
    opt.step()
    assert opt.scales().keys() == grads.keys() and all(p.isfinite().all() for p in ours.values())


@pytest.mark.parametrize("call", [dict(), dict(lr=0.5), dict(lr=0.5, momentum=0.5, eps=1e-6, weight_decay=0.1)])
def test_authors_calls_mean_the_same(Authors, call):
    for make in (
        lambda *a: (Authors(*a, **call), SGD_sai(*a, **call)),
        lambda *a: (Authors(*a, *call.values()), SGD_sai(*a, *call.values())),
    ):
        theirs, ours = make([nn.Parameter(torch.ones(2))])
        for key, value in theirs.defaults.items():
            assert ours.defaults[key] == value


@each_of_ours
def test_nothing_is_printed(task, ours, capfd):
    model_class, grads = task
    model = same_start(model_class)
    opt = ours(model.parameters())
    train(model, opt.step, grads[:3])
    opt.load_state_dict(opt.state_dict())
    if isinstance(opt, SGD_sai):
        opt.warmup_step()
    train(model, opt.step, grads[3:5])
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


VARIANTS = {
    "plain": {},
    "no momentum": dict(momentum=0.0),
    "nesterov": dict(nesterov=True),
    "maximize": dict(maximize=True),
    "both": dict(nesterov=True, maximize=True),
    "normalize": dict(normalize=True),
    "state_dtype": dict(state_dtype=torch.bfloat16),
}
FLAGS = {
    "forloop": dict(foreach=False, fused=False),
    "foreach": dict(foreach=True),
    "fused": dict(fused=True),
    "default": {},
    "capturable": dict(capturable=True),
}


def cases(*dtypes):
    return list(every_case(*dtypes))


def every_case(*dtypes):
    for dtype in dtypes:
        for variant, kw in VARIANTS.items():
            for name, flags in FLAGS.items():
                if name == "fused" and (dtype.is_complex or "state_dtype" in kw and dtype != kw["state_dtype"]):
                    continue  # refused: the fused kernel wants real tensors of one dtype
                yield pytest.param(dtype, {**kw, **flags}, id=f"{str(dtype)[6:]}-{variant}-{name}")


@pytest.mark.parametrize("dtype, kw", cases(torch.float32, torch.bfloat16, torch.complex64))
def test_gradients_are_left_alone(dtype, kw):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((), (7,), (4, 6), (3, 4, 2, 2), (0, 3))]
    params.append(nn.Parameter(torch.randn(2, 4, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)))
    params.append(nn.Parameter(torch.randn(5, 4).to(dtype).t()))
    opt = SGDSaI(params, **kw)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)  # contiguous, even where the parameter is not
        kept = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        opt.step()
        for p, (grad, value, version) in zip(params, kept, strict=True):
            assert (
                p.grad is grad
                and grad._version == version
                and torch.equal(
                    torch.view_as_real(grad) if dtype.is_complex else grad,
                    torch.view_as_real(value) if dtype.is_complex else value,
                )
            )


def test_memory_is_measured():
    x = torch.zeros(1 << 20)
    assert allocated_peak(lambda: x.mul_(2)) < 1e4
    assert 4e6 < allocated_peak(lambda: x * 2) < 5e6 and 8e6 < allocated_peak(lambda: (x * 2).sub_(x * 3)) < 9e6


ENTRIES = 1 << 23
BUDGET = 2 * 4 * 3 * FP32_CHUNK + 100_000  # float32 copies of two chunks of parameter, gradient and momentum
assert BUDGET < 2 * ENTRIES  # bytes of the smallest parameter below


@pytest.mark.parametrize("dtype, kw", cases(torch.float32, torch.bfloat16))
def test_step_allocates_nothing_of_parameter_size(dtype, kw):
    p = nn.Parameter(torch.empty(2048, ENTRIES // 2048, dtype=dtype).uniform_(-1, 1))
    p.grad = torch.empty_like(p).uniform_(-1, 1)
    opt = SGDSaI([p], **kw)
    opt.step()
    assert p.numel() == ENTRIES and allocated_peak(opt.step) <= BUDGET


@pytest.mark.parametrize("implementation", ["forloop", "foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_step_allocates_nothing_of_parameter_size_in_any_memory_layout(dtype, implementation, layout):
    p = nn.Parameter(layout[0](torch.empty(1024, ENTRIES // (1024 * 16), 4, 4, dtype=dtype).uniform_(-1, 1)))
    p.grad = layout[1](p.detach().clone(memory_format=torch.contiguous_format))
    opt = SGDSaI([p], **FLAGS[implementation])
    opt.step()
    assert allocated_peak(opt.step) <= BUDGET


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measuring_allocates_nothing_of_parameter_size(dtype):
    g = torch.empty(2048, ENTRIES // 2048, dtype=dtype).uniform_(-1, 1)
    assert allocated_peak(lambda: measure_scales([g])) < (
        100_000 if dtype == torch.float32 else 2.2 * 2**20
    )  # two chunks of a quarter million, widened
