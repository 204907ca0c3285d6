'''PyTorch's own optimizer checks, for SGDSaI, Adan and AdaHessian: the test names of its test/test_optim.py (TestOptimRenewed) and of its differentiable-optimizer
tests, the inputs of torch.testing._internal.common_optimizers. Each check runs on the CPU, and on CUDA where there is one. What the checks have to know about an
optimizer stands in a `Kind`.

What is skipped or differs, and why. For all three:

| check | here | reason |
|---|---|---|
| test_rosenbrock_sparse | the error is checked | sparse gradients are refused by design: G is a statistic of the whole tensor, averages over time would be dense, and there is no sparse curvature |
| test_second_order_optims_return_consistent_types | no such test | for optimizers that need a closure |
| test_cpu_load_state_dict | only on CUDA, as for SGD | a state that comes from the CPU has to arrive on the device |
| multigpu, test_mixed_device_dtype | need two GPUs; a version with mixed dtypes on one device runs everywhere | as in PyTorch |
| test_peak_memory_foreach | CUDA, as in PyTorch | its limit is about the CUDA allocator; tests/test_authors.py and tests/test_adan.py have stricter ones for the CPU |
| test_foreach_large_tensor | gradients are random instead of zero | with zero gradients nothing starts, or moves, so nothing would be tested |
| capturable inputs | run on the CPU too | stricter: they are supported there |

SGDSaI (SGD's own list has no skips outside of torch.compile's test mode):

| check | here | reason |
|---|---|---|
| test_complex, test_complex_2d | the real twin gets the complex tensor's scales by `set_scales` | G of a complex tensor is made of n moduli; the update, which is element-wise, is still compared exactly |
| test_load_nontensor_step | the number that may be tensor or float is `gsnr` | there is no `step` in the state |
| test_defaults_changed_to_foreach | looks for the function `_foreach` on CUDA, and for `_fused` on the CPU | names differ; on the CPU the fused kernel is the default |
| test_fused_does_not_step_if_foundinf, test_grad_scaling_autocast_fused_optimizers | through GradScaler alone | the fused kernel is called piece by piece without found_inf; the scaler unscales and skips the step itself |
| test_fused_large_tensor | on the CPU the sizes given to the kernel are checked | the CPU kernel is only given pieces |
| the checks of the loss's direction | lr 1e-3, SGD's default, where the input gives none | lr is multiplied by G here, and the momentum starts with the whole first gradient |

Adan:

| check | here | reason |
|---|---|---|
| test_fused_* | none | there is no fused kernel |
| test_defaults_changed_to_foreach | looks for `_foreach` on CUDA and for small tensors, for `_for_loop` for large tensors on the CPU | names differ; the loop goes through large tensors in pieces that stay in the cache |
| test_grad_scaling_autocast_fused_optimizers | with foreach and the loop | the check is about GradScaler, which every optimizer meets |
| inputs with restart_radius | not with `differentiable`, not in a CUDA graph | refused; the criterion is looked at by the host |

AdaHessian:

| check | here | reason |
|---|---|---|
| all | backward(create_graph=True); where PyTorch assigns gradients, they get a graph that says curvature 1 | the step needs the graph of the gradients |
| test_foreach_*, test_fused_*, test_mixed_device_dtype, test_peak_memory_foreach, test_differentiable*, test_cuda_graph_equals_eager | none | it has no foreach, fused, differentiable or capturable form: the extra backward pass outweighs the step, and its graph is new each time |
| test_complex, test_complex_2d | the error is checked, in test_errors | complex parameters are refused: whether real and imaginary part share a curvature is not defined |
| test_grad_scaling_autocast_fused_optimizers | without unscale_ and clipping | refused, see tests/test_adahessian.py |
| the checks of the loss's direction | lr 0.02, eps 0.1, where the input gives none | one draw of signs can make a curvature of next to nothing, and the steps of the default 0.15 are Newton's |
'''
import inspect
import itertools
import re
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
)
from torch.testing._internal.common_utils import TestCase

import sgd_sai.adahessian
import sgd_sai.adan
import sgd_sai.optimizer
from sgd_sai.adahessian import AdaHessian
from sgd_sai.adan import Adan
from sgd_sai.optimizer import SGD_sai, SGDSaI


@dataclass(frozen=True)
class Kind:
    "What the checks have to know about an optimizer."
    cls: type
    module: ModuleType  # where the functions that make its step live
    table: Callable  # () -> description -> keyword arguments to build it with, without the flags that choose an implementation
    errors: Callable  # (error, parameters on the device) -> its own error inputs
    like: type  # the optimizer of PyTorch that it is to take the place of
    released: tuple  # arguments that the authors' class has too
    gentle: dict  # for small steep problems, where the input says nothing else
    number: str  # entry of the state that files may hold as a number or as a tensor
    average: str  # entry of the state that is a tensor of the parameter's shape
    states: Callable  # keyword arguments -> the entries of the state after a step
    loop: dict = field(default_factory=dict)  # flags that choose the plain loop
    flags: tuple = ()  # flags that choose other implementations
    supports: tuple = ()  # foreach, differentiable, fused
    capturable: bool = False
    create_graph: bool = False

    def optim_inputs(self, device, dtype=None):
        return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in self.table().items()]

    def capturable_inputs(self, device, dtype=None):
        "As above with `capturable`, which excludes a fused kernel."
        if not self.capturable:
            return []
        return [OptimizerInput(params=None, kwargs={**i.kwargs, "capturable": True}, desc=f"{i.desc} & capturable") for i in self.optim_inputs(device)]

    def inputs(self, device):
        return self.optim_inputs(device) + self.capturable_inputs(device)

    @property
    def own_flags(self):
        "Arguments that the authors' class does not have."
        return tuple(name for name in inspect.signature(self.cls).parameters if name not in self.released and name != "process_group")

    def info(self, inputs, supports):
        like = next(info for info in optim_db if info.optim_cls is self.like)
        return OptimizerInfo(self.cls, optim_inputs_func=inputs, optim_error_inputs_func=self.error_inputs, supported_impls=supports,
                             scheduler_inputs=like.scheduler_inputs, not_og_supported_flags=self.own_flags, supports_sparse=False,
                             has_capturable_arg=self.capturable, supports_complex=not self.create_graph, supports_fused_on=("cpu", "cuda"))

    @property
    def schedulers(self):
        return self.info(self.optim_inputs, self.supports).scheduler_inputs

    def all_inputs(self, device, skip=("differentiable",)):
        "Every input with every implementation that goes with it."
        infos = [self.info(self.optim_inputs, self.supports), self.info(self.capturable_inputs, tuple(s for s in self.supports if s != "fused"))]
        full = [given for info in infos for given in _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, info, skip=skip)]
        return [given for given in full if not (given.kwargs.get("differentiable") and given.kwargs.get("restart_radius"))]

    def error_inputs(self, device, dtype):
        "What PyTorch demands of every optimizer, and errors of its own hyperparameters."
        def error(match, error_type=ValueError, params=None, error_on=OptimizerErrorEnum.CONSTRUCTION_ERROR, **kwargs):
            params = [Parameter(torch.randn(2, 2, device=device, dtype=dtype))] if params is None else params
            return ErrorOptimizerInput(OptimizerInput(params=params, kwargs=kwargs, desc=match), error_on=error_on, error_type=error_type, error_regex=match)

        sparse = Parameter(torch.randn(2, 2, device=device, dtype=dtype))
        sparse.grad = torch.randn(2, 2, device=device, dtype=dtype).to_sparse()
        infinite = Parameter(torch.randn(2, 2, device=device, dtype=dtype))
        infinite.grad = torch.full_like(infinite, torch.inf)
        return get_error_inputs_for_all_optims(device, dtype) + [
            error("Invalid learning rate: -0.1", lr=-0.1),
            error("Invalid learning rate: nan", lr=float("nan")),
            error("Invalid weight_decay value: -1", weight_decay=-1),
            error("Invalid epsilon value: -1e-08", eps=-1e-8),
            error("Invalid state_dtype value: torch.int32", state_dtype=torch.int32),
            error("Invalid weight_decay value: -2", params=[{"params": [infinite]}, {"params": [sparse], "weight_decay": -2}]),
            error("does not support sparse gradients", RuntimeError, [sparse], OptimizerErrorEnum.STEP_ERROR),
        ] + self.errors(error, infinite)

    def slowly(self, kwargs):
        return {**self.gentle, **kwargs}

    def backward(self, loss):
        loss.backward(create_graph=self.create_graph)

    def give(self, p, g):
        "Let `g` be the gradient of p; where a graph is needed, that of a loss with curvature 1 everywhere."
        g = None if g is None else g.detach()
        p.grad = g + (p - p.detach()) if self.create_graph and g is not None else g

    @property
    def implementations(self):
        "Flags for each implementation there is."
        return [self.loop, *self.flags]


def sgdsai_table():
    "Those of SGD where they exist here, and our own."
    return {
        "default": {},
        "non-default lr": dict(lr=2e-3),
        "tensor lr": dict(lr=torch.tensor(0.001)),
        "non-zero weight_decay": dict(weight_decay=0.5),
        "no weight_decay": dict(weight_decay=0.0),
        "no momentum": dict(momentum=0.0),
        "momentum": dict(momentum=0.5),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.1),
        "nesterov & maximize": dict(nesterov=True, maximize=True),
        "sqrt_numel": dict(scale="sqrt_numel", weight_decay=0.0),
        "normalize": dict(normalize=True, lr=5e-3),
        "max_ratio": dict(max_ratio=None),
        "eps": dict(eps=1e-4),
    }


def sgdsai_errors(error, infinite):
    return [
        error("Invalid momentum value: -0.5", momentum=-0.5),
        error("Invalid momentum value: 1.0", momentum=1.0),
        error("Nesterov momentum requires a momentum", nesterov=True, momentum=0),
        error("Invalid scale: 'sqrt'", scale="sqrt"),
        error("Invalid max_ratio value: 0.5", max_ratio=0.5),
        error("`fused` and `foreach` cannot be `True` together", RuntimeError, fused=True, foreach=True),
        error("`fused` does not support `differentiable`", RuntimeError, fused=True, differentiable=True),
        error("`foreach` does not support `differentiable`", RuntimeError, foreach=True, differentiable=True),
        error("`fused` does not support `capturable`", RuntimeError, fused=True, capturable=True),
        error("`fused=True` requires all the params to be floating point", RuntimeError, [torch.zeros(2, dtype=torch.complex64)], fused=True),
        error("is not finite", RuntimeError, [infinite], OptimizerErrorEnum.STEP_ERROR),
    ]


def adan_table():
    "Those of AdamW where they exist here, and our own."
    return {
        "default": {},
        "non-default lr": dict(lr=0.01),
        "tensor lr": dict(lr=torch.tensor(0.001)),
        "non-zero weight_decay": dict(weight_decay=0.1),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "no_prox": dict(no_prox=True, weight_decay=0.1),
        "betas": dict(betas=(0.9, 0.5, 0.95)),
        "no averages": dict(betas=(0.0, 0.0, 0.0), eps=1e-3),
        "eps": dict(eps=1e-4),
        "restart_radius": dict(restart_radius=1e3),
    }


def adan_errors(error, infinite):
    return [
        error("Invalid beta parameter at index 0: 1.0", betas=(1.0, 0.9, 0.9)),
        error("Invalid beta parameter at index 1: -0.1", betas=(0.9, -0.1, 0.9)),
        error("Invalid beta parameter at index 2: nan", betas=(0.9, 0.9, float("nan"))),
        error("3 are needed", betas=(0.9, 0.999)),
        error("Invalid restart_radius value: -1", restart_radius=-1),
        error("`foreach` does not support `differentiable`", RuntimeError, foreach=True, differentiable=True),
        error("`restart_radius` does not support `differentiable`", RuntimeError, restart_radius=1.0, differentiable=True),
        error("`differentiable` does not support complex parameters", RuntimeError, [torch.zeros(2, dtype=torch.complex64)], differentiable=True),
        error("unexpected keyword argument 'max_grad_norm'", TypeError, max_grad_norm=1.0),
    ]


def adahessian_table():
    "Those of AdamW where they exist here, and our own."
    return {
        "default": {},
        "non-default lr": dict(lr=0.05),
        "tensor lr": dict(lr=torch.tensor(0.05)),
        "non-zero weight_decay": dict(weight_decay=0.1),
        "maximize": dict(weight_decay=0.1, maximize=True),
        "betas": dict(betas=(0.5, 0.9)),
        "eps": dict(eps=1e-2),
        "hessian_power": dict(hessian_power=0.5, weight_decay=0.1),
        "n_samples": dict(n_samples=2, seed=1),
        "update_period": dict(update_period=2),
        "block_size": dict(block_size=4, signed_average=True),
    }


def adahessian_errors(error, infinite):
    forgotten = Parameter(torch.randn_like(infinite))
    forgotten.grad = torch.randn_like(infinite)
    return [
        error("Invalid beta parameter at index 0: 1.0", betas=(1.0, 0.9)),
        error("Invalid beta parameter at index 1: -0.1", betas=(0.9, -0.1)),
        error("2 are needed", betas=(0.9, 0.9, 0.9)),
        error("Invalid hessian_power value: 1.5", hessian_power=1.5),
        error("Invalid n_samples value: 0", n_samples=0),
        error("Invalid update_period value: 0", update_period=0),
        error("Invalid block_size value: 1.5", block_size=1.5),
        error("does not support complex parameters", params=[torch.zeros(2, dtype=torch.complex64)]),
        error(r"call loss\.backward\(create_graph=True\)", RuntimeError, [forgotten], OptimizerErrorEnum.STEP_ERROR),
    ]


SGDSAI = Kind(
    SGDSaI, sgd_sai.optimizer, sgdsai_table, sgdsai_errors, like=SGD,
    released=tuple(inspect.signature(SGD_sai).parameters),
    gentle=dict(lr=1e-3),
    number="gsnr", average="momentum_buffer",
    states=lambda kwargs: {"gsnr"} if kwargs.get("momentum") == 0 else {"gsnr", "momentum_buffer"},
    loop=dict(foreach=False, fused=False),
    flags=({}, dict(foreach=True), dict(fused=True), dict(capturable=True), dict(capturable=True, foreach=True)),
    supports=("foreach", "differentiable", "fused"), capturable=True,
)
ADAN = Kind(
    Adan, sgd_sai.adan, adan_table, adan_errors, like=AdamW,
    released=("params", "lr", "betas", "eps", "weight_decay", "no_prox", "foreach"),
    gentle=dict(lr=1e-3),
    number="step", average="exp_avg",
    states=lambda kwargs: {"step", "exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"} | ({"path"} if "restart_radius" in kwargs else set()),
    loop=dict(foreach=False),
    flags=({}, dict(foreach=True), dict(capturable=True), dict(capturable=True, foreach=True)),
    supports=("foreach", "differentiable"), capturable=True,
)
ADAHESSIAN = Kind(
    AdaHessian, sgd_sai.adahessian, adahessian_table, adahessian_errors, like=AdamW,
    released=("params", "lr", "betas", "eps", "weight_decay", "hessian_power"),
    gentle=dict(lr=0.02, eps=0.1),
    number="step", average="exp_avg",
    states=lambda kwargs: {"step", "hessian_step", "exp_avg", "exp_hessian_diag_sq"},
    create_graph=True,
)

pytestmark = [pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too"), pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")]
CHECK = TestCase()  # for assertEqual, with PyTorch's tolerances
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one GPU")]
each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
only_cuda = pytest.mark.parametrize("device", [CUDA])
only_cpu = pytest.mark.parametrize("device", ["cpu"])


def kinds(*chosen):
    return pytest.mark.parametrize("kind", chosen, ids=lambda kind: kind.cls.__name__)


each_kind = kinds(SGDSAI, ADAN, ADAHESSIAN)
with_foreach = kinds(SGDSAI, ADAN)


def problem(kind, device, dtype=torch.float32, contiguous=True, bias_device=None):
    "weight, bias, and a function that fills their gradients and returns the loss."
    if contiguous:
        weight, bias = Parameter(torch.randn(10, 5, device=device, dtype=dtype)), Parameter(torch.randn(10, device=bias_device or device, dtype=dtype))
    else:
        weight = Parameter(torch.randn(10, 5, 2, device=device, dtype=dtype)[..., 0])
        bias = Parameter(torch.randn(10, 2, device=device, dtype=dtype)[..., 0])
    x = torch.randn(5, device=device, dtype=dtype)
    return weight, bias, partial(evaluate, kind, weight, bias, x)


def evaluate(kind, weight, bias, x):
    weight.grad = bias.grad = None
    loss = (weight.mv(x).to(bias.device) + bias).pow(2).sum()
    kind.backward(loss)
    return loss


def step_schedulers(schedulers, loss):
    for scheduler in schedulers:
        scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


def assert_right_direction(before, after, given):
    assert after > before if given.kwargs.get("maximize") else after < before, f"{given.desc}: from {before} to {after}"


def snapshot(opt, params):
    "Parameters and state as one structure that assertEqual can compare."
    return [p.detach().clone() for p in params], [{k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state[p].items()} for p in params]


@each_kind
@only_cpu
def test_optim_infos_do_not_specify_global_cliquey_kwargs(kind, device):
    assert len(kind.inputs(device)) > 10
    assert not any(flag in i.kwargs for i in kind.inputs(device) for flag in ("foreach", "fused", "differentiable"))


@each_kind
@only_cpu
def test_errors(kind, device):
    for case in kind.error_inputs(device, torch.float32):
        given = case.optimizer_error_input
        params = given.params if given.params is not None else [Parameter(torch.randn(2, 2))]
        expect = partial(pytest.warns if issubclass(case.error_type, Warning) else pytest.raises, case.error_type, match=case.error_regex)
        if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with expect():
                kind.cls(params, **given.kwargs)
        else:
            opt = kind.cls(params, **given.kwargs)
            with expect():
                opt.step()


@each_kind
@only_cpu
def test_error_in_a_later_group_leaves_the_optimizer_as_it_was(kind, device):
    opt = kind.cls([Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        opt.add_param_group({"params": [Parameter(torch.ones(2))], "lr": -1})
    assert len(opt.param_groups) == 1


@each_kind
@each_device
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_forloop_goes_right_direction(kind, device, contiguous, with_lrsched):
    for make_schedulers in kind.schedulers if with_lrsched else [[]]:
        for given in kind.inputs(device):
            weight, bias, closure = problem(kind, device, contiguous=contiguous)
            opt = kind.cls([weight, bias], **kind.slowly(given.kwargs), **kind.loop)
            schedulers = [make(opt) for make in make_schedulers]
            before = closure().item()
            for _ in range(20):
                loss = closure()
                opt.step()
                step_schedulers(schedulers, loss)
            assert_right_direction(before, closure().item(), given)


@each_kind
@pytest.mark.parametrize("device", [pytest.param("cuda:0", marks=TWO_GPUS)])
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_forloop_goes_right_direction_multigpu(kind, device, with_lrsched):
    for make_schedulers in kind.schedulers if with_lrsched else [[]]:
        for given in kind.inputs(device):
            weight, bias, closure = problem(kind, device, bias_device="cuda:1")
            opt = kind.cls([weight, bias], **kind.slowly(given.kwargs), **kind.loop)
            schedulers = [make(opt) for make in make_schedulers]
            before = closure().item()
            for _ in range(20):
                step_schedulers(schedulers, opt.step(closure))
            assert_right_direction(before, closure().item(), given)


@each_kind
@each_device
def test_param_group_with_lrscheduler_goes_right_direction(kind, device):
    for make_schedulers in kind.schedulers:
        for flags in kind.implementations:
            weight, bias, closure = problem(kind, device)
            opt = kind.cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **kind.slowly(flags))
            schedulers = [make(opt) for make in make_schedulers]
            before = closure().item()
            for _ in range(20):
                step_schedulers(schedulers, opt.step(closure))
            assert closure().item() < before


@each_kind
@each_device
@pytest.mark.parametrize("num_dim", [0, 1, 2])
def test_tensor_lr(kind, device, num_dim):
    for given, lr_device in itertools.product(kind.all_inputs(device), {device, "cpu"}):
        weight, bias, _ = problem(kind, device)
        x = torch.randn(5, device=device)
        twins = [Parameter(p.detach().clone()) for p in (weight, bias)]
        kwargs = {**given.kwargs, "lr": 1e-3}
        opt = kind.cls([weight, bias], **kwargs)
        opt_t = kind.cls(twins, **{**kwargs, "lr": torch.tensor(1e-3).reshape([1] * num_dim).to(lr_device)})
        for _ in range(5):
            evaluate(kind, weight, bias, x), evaluate(kind, *twins, x)
            opt.step(), opt_t.step()
            CHECK.assertEqual([weight, bias], twins, msg=given.desc)
        assert weight.shape == (10, 5) and isinstance(opt_t.param_groups[0]["lr"], torch.Tensor)


@each_kind
@each_device
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_tensor_lr_is_followed_when_it_changes(kind, device, with_lrsched):
    for flags in kind.implementations:
        weight, bias, _ = problem(kind, device)
        x = torch.randn(5, device=device)
        twins = [Parameter(p.detach().clone()) for p in (weight, bias)]
        lr = torch.tensor(1e-3, device=device)
        opts = kind.cls([weight, bias], lr=1e-3, **flags), kind.cls(twins, lr=lr, **flags)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in opts] if with_lrsched else []
        for t in range(4):
            evaluate(kind, weight, bias, x), evaluate(kind, *twins, x)
            opts[0].step(), opts[1].step()
            step_schedulers(schedulers, None)
            if not with_lrsched:
                opts[0].param_groups[0]["lr"] *= 0.5
                lr.mul_(0.5)
            CHECK.assertEqual([weight, bias], twins)
        assert opts[1].param_groups[0]["lr"] is lr and lr.item() == pytest.approx(1e-3 / 16)


@each_kind
@each_device
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_rosenbrock_sparse(kind, device, with_lrsched):
    for given in kind.all_inputs(device):
        p = Parameter(torch.tensor([1.5, 1.5], device=device))
        opt = kind.cls([("point", p)], **given.kwargs)
        if with_lrsched:
            for make in kind.schedulers[0]:
                make(opt)
        for dense_first in (False, True):
            p.grad = torch.sparse_coo_tensor([[0, 0]], [0.3, 0.7], (2,), device=device)
            before = p.detach().clone()
            with pytest.raises(RuntimeError, match=f"{kind.cls.__name__} does not support sparse gradients, which parameter point has: build its layer"):
                opt.step()
            assert torch.equal(p, before)
            kind.give(p, torch.tensor([0.3, -0.7], device=device))
            opt.step()
            assert not torch.equal(p, before)


def real_twins(params):
    return [torch.view_as_real(p).detach().clone().requires_grad_() if p.is_complex() else p.detach().clone().requires_grad_() for p in params]


def give_scales(opt, other, params):
    "The scales that SGDSaI measures for `params`, given to the parameters of another, in their order."
    sgd_sai.optimizer.start(opt)
    other.set_scales({name: float(opt.state[p]["gsnr"]) for (name, _), p in zip(other.named(), params)})


@with_foreach
@each_device
def test_complex(kind, device):
    for given in kind.all_inputs(device, skip=("differentiable",) + ("fused",) * (kind is SGDSAI)):
        shapes = [((10, 5), torch.complex64), ((10,), torch.complex64), ((10, 5), torch.float32)]  # the last is real, so that they are mixed
        params = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape, dtype in shapes]
        twins = real_twins(params)
        opt, opt_r = kind.cls(params, **given.kwargs), kind.cls(twins, **given.kwargs)
        for t in range(3):
            for p, q in zip(params, twins):
                q.grad = torch.randn_like(q)
                p.grad = torch.view_as_complex(q.grad.clone()) if p.is_complex() else q.grad.clone()
            if t == 0 and kind is SGDSAI:
                give_scales(opt, opt_r, params)
                if given.kwargs.get("scale") != "sqrt_numel":  # n moduli, and the standard deviation of complex numbers
                    for p in params:
                        eps = given.kwargs.get("eps", 1e-8)
                        assert float(opt.state[p]["gsnr"]) == pytest.approx((p.grad.norm() / (p.grad.std() + eps)).item(), rel=1e-5)
                assert all(float(opt.state[p]["gsnr"]) <= 1.5 * p.numel() ** 0.5 for p in params)
            opt.step(), opt_r.step()
            CHECK.assertEqual([torch.view_as_real(p) if p.is_complex() else p for p in params], twins, msg=given.desc)
            CHECK.assertEqual([opt_r.state[q].get(kind.average) for q in twins],
                              [torch.view_as_real(m) if m is not None and m.is_complex() else m for m in (opt.state[p].get(kind.average) for p in params)])


def rosenbrock(point):
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@with_foreach
@each_device
def test_complex_2d(kind, device):
    for given in kind.all_inputs(device, skip=("differentiable",) + ("fused",) * (kind is SGDSAI)):
        a = torch.randn(2, device=device, dtype=torch.complex64, requires_grad=True)
        re_, im = a.real.detach().clone().requires_grad_(), a.imag.detach().clone().requires_grad_()
        kwargs = {**given.kwargs, "lr": 1e-5}
        opt, parts = kind.cls([a], **kwargs), kind.cls([re_, im], **kwargs)
        for t in range(3):
            opt.zero_grad(), parts.zero_grad()
            rosenbrock(a).abs().backward()
            with torch.no_grad():
                re_.copy_(a.real), im.copy_(a.imag)  # rounding must not add up through the steep function
            rosenbrock(torch.complex(re_, im)).abs().backward()
            CHECK.assertEqual(a.grad.real, re_.grad)
            CHECK.assertEqual(a.grad.imag, im.grad)
            re_.grad, im.grad = a.grad.real.clone(), a.grad.imag.clone()
            if t == 0 and kind is SGDSAI:
                give_scales(opt, parts, [a, a])
            opt.step(), parts.step()
            CHECK.assertEqual(a.real, re_)
            CHECK.assertEqual(a.imag, im)


def small_net(dtype, device):
    torch.manual_seed(1)
    layers = torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    return torch.nn.Sequential(*layers).to(dtype=dtype, device=device)


def rounding_of(value):
    """Tolerance for 16-bit tensors, PyTorch's own for others. The fused kernel rounds after the decay and after the update, the loop once: an
    entry that happens to end near zero is off by a rounding of what it was made of. (PyTorch sees it less, with its ten times smaller steps.)"""
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float16, torch.bfloat16) or not value.numel():
        return {}
    eps = torch.finfo(value.dtype).eps
    return dict(rtol=2 * eps, atol=eps * value.abs().max().item())


def compare_between(inputs, models, opts, **tolerance):
    "Seven steps of several optimizers, the state and parameters of all set to those of the first after every step."
    for i in range(7):
        for x, model, opt in zip(inputs, models, opts):
            opt.zero_grad()
            if i in (3, 5):
                model[2].requires_grad_(i == 5)  # frozen for two steps
            if i != 2:  # no gradients at all in this step
                model(x).sum().backward()
            opt.step()
        for model, opt in zip(models[1:], opts[1:]):
            for p, q in zip(models[0].parameters(), model.parameters()):
                CHECK.assertEqual(q, p, exact_device=False, **(tolerance or rounding_of(p)))
                assert opts[0].state[p].keys() == opt.state[q].keys()
                with torch.no_grad():
                    q.copy_(p)
                for key, value in opts[0].state[p].items():
                    CHECK.assertEqual(opt.state[q][key], value, exact_device=False, **(tolerance or rounding_of(value)))
                    if isinstance(value, torch.Tensor):
                        opt.state[q][key].copy_(value)
        assert opts[0].state


def derived_optimizers(kind, device, dtype, flag, **tolerance):
    for given in kind.inputs(device):
        if flag == "fused" and given.kwargs.get("capturable"):
            continue  # refused at construction, see test_errors
        models, opts = [], []
        x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype, device=device).reshape(3, 2)
        for value in (False, True):
            model = small_net(dtype, device)
            scalar = torch.rand((), device=device, dtype=dtype, requires_grad=True)
            empty = torch.rand((0, 3), device=device, dtype=dtype, requires_grad=True)
            for p in (scalar, empty):
                p.grad = torch.rand_like(p)
            opts.append(kind.cls([*model.parameters(), scalar, empty], **{**given.kwargs, **kind.loop, flag: value}))
            models.append(model)
        compare_between([x, x], models, opts, **tolerance)


@with_foreach
@each_device
def test_foreach_matches_forloop(kind, device):
    derived_optimizers(kind, device, torch.float64, "foreach")


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fused_matches_forloop(device, dtype):
    derived_optimizers(SGDSAI, device, dtype, "fused")


DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("kind, impl", [(SGDSAI, "foreach"), (SGDSAI, "fused"), (ADAN, "foreach")], ids=lambda x: x if isinstance(x, str) else x.cls.__name__)
@pytest.mark.parametrize("devices", [["cpu"], pytest.param(["cuda:0"], marks=pytest.mark.gpu), pytest.param(["cuda:0", "cuda:1"], marks=TWO_GPUS)], ids=str)
def test_mixed_device_dtype(kind, devices, impl):
    params = [torch.rand(2, 3, dtype=dtype, device=device, requires_grad=True) for device in devices for dtype in DTYPES]
    grads = [torch.rand_like(p) for p in params]
    for given in kind.inputs(devices[0]):
        if impl == "fused" and given.kwargs.get("capturable"):
            continue
        results = []
        for use in (False, True):
            clones = [p.detach().clone().requires_grad_() for p in params]
            opt = kind.cls(clones, **{**given.kwargs, impl: use})
            for _ in range(7 if impl == "foreach" else 1):
                for p, g in zip(clones, grads):
                    p.grad = g.clone()
                opt.step()
            results.append(snapshot(opt, clones))
        for p, q, s, t in zip(*results[0][:1], *results[1][:1], results[0][1], results[1][1]):
            rtol, atol = torch.testing._comparison.get_tolerances(p.dtype, rtol=None, atol=None)
            CHECK.assertEqual(q, p, rtol=5 * rtol, atol=5 * atol)
            CHECK.assertEqual(t, s, rtol=5 * rtol, atol=5 * atol)


@each_kind
@each_device
def test_set_default_dtype_works_with_foreach(kind, device):
    before = torch.get_default_dtype()
    for default in (torch.float64, torch.float16):
        try:
            torch.set_default_dtype(default)
            if "foreach" in kind.supports:
                derived_optimizers(kind, device, torch.float64, "foreach", **(dict(atol=1e-5, rtol=1e-4) if default == torch.float16 else {}))
            p = Parameter(torch.randn(3, 2, dtype=torch.float32, device=device))
            kind.give(p, torch.randn_like(p))
            opt = kind.cls([p], **(dict(capturable=True) if kind.capturable else {}))
            opt.step()
            assert opt.state[p][kind.number].dtype == opt.state[p][kind.average].dtype == torch.float32
        finally:
            torch.set_default_dtype(before)


def large_tensor_step(kind, given, **flags):
    p = torch.ones(2**32, device="cuda", dtype=torch.float16)
    p.grad = torch.empty_like(p).normal_()
    kind.cls([p], **flags, **given.kwargs).step()
    assert p[-1] != 1 and p[2**31] != 1


@with_foreach
@only_cuda
def test_foreach_large_tensor(kind, device):
    if torch.cuda.mem_get_info()[0] < 72e9:
        pytest.skip("needs 72 GB of GPU memory")
    for given in kind.optim_inputs(device)[:3]:
        large_tensor_step(kind, given, foreach=True)


@each_device
def test_fused_large_tensor(device):
    if device == "cpu":
        sizes, real = [], torch._fused_sgd_
        p = Parameter(torch.ones(3 * sgd_sai.optimizer.PIECE + 5))
        p.grad = torch.randn_like(p)
        with patch.object(torch, "_fused_sgd_", lambda ps, *a, **k: (sizes.append(ps[0].numel()), real(ps, *a, **k))):
            SGDSaI([p], fused=True).step()
        assert sum(sizes) == 2 * p.numel() and max(sizes) <= sgd_sai.optimizer.PIECE < 2**31  # once for the average, once for the step
        return
    if torch.cuda.mem_get_info()[0] < 64e9:
        pytest.skip("needs 64 GB of GPU memory")
    for given in SGDSAI.optim_inputs(device)[:3]:
        large_tensor_step(SGDSAI, given, fused=True)


@with_foreach
@only_cuda
def test_peak_memory_foreach(kind, device):
    for given in kind.inputs(device):
        peaks = []
        for flag in (False, True):
            params = [torch.rand(16, 8, device=device) for _ in range(10)]  # 512 bytes, the block size of the allocator
            for p in params:
                p.grad = torch.rand_like(p)
            opt = kind.cls(params, **{**given.kwargs, **kind.loop, "foreach": flag})
            opt.step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            opt.step()
            peaks.append(torch.cuda.max_memory_allocated())
        assert peaks[1] <= peaks[0] + 10 * 512


@each_device
def test_fused_error_on_params_on_meta(device):
    with torch.device("meta"):
        model = small_net(torch.float32, "meta")
    opt = SGDSaI(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        opt.step()
    opt.zero_grad(set_to_none=True)
    opt.step()
    model.to_empty(device=device)  # makes new parameters
    opt = SGDSaI(model.parameters(), fused=True)
    for p in model.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.rand_like(p)
    opt.step()
    assert all((p != 1).any() for p in model.parameters())


def scaler_for(device):
    return torch.amp.GradScaler(device, init_scale=4.0, growth_interval=1000)


@each_device
def test_fused_does_not_step_if_foundinf(device):
    for given in SGDSAI.optim_inputs(device):
        params = [Parameter(torch.ones(1, device=device)) for _ in range(5)]
        opt, scaler = SGDSaI(params, fused=True, **given.kwargs), scaler_for(device)
        scaler.scale(sum(p.sum() for p in params)).backward()
        params[2].grad.fill_(torch.inf)
        scaler.step(opt)
        scaler.update()
        assert all(p.item() == 1 for p in params) and not opt.scales() and scaler.get_scale() == 2
        opt.zero_grad()
        scaler.scale(sum(p.sum() for p in params)).backward()
        scaler.step(opt)
        assert all(p.item() != 1 for p in params) and set(opt.scales().values()) <= {1.0}


@each_kind
@each_device
def test_grad_scaling_autocast_fused_optimizers(kind, device):
    for given, flags in itertools.product(kind.optim_inputs(device), kind.implementations):
        runs = []
        for scaled in (False, True):
            model, x = small_net(torch.float32, device), torch.ones(3, 2, device=device)
            opt, scaler = kind.cls(model.parameters(), **deepcopy(given.kwargs), **flags), torch.amp.GradScaler(device, init_scale=128.0, enabled=scaled)
            for _ in range(4):
                opt.zero_grad()
                with torch.autocast(device, torch.bfloat16):
                    loss = model(x).float().sum()
                kind.backward(scaler.scale(loss))
                if not kind.create_graph:  # refused there
                    scaler.unscale_(opt)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
                scaler.step(opt)
                scaler.update()
            runs.append(snapshot(opt, model.parameters()))
        CHECK.assertEqual(*runs, msg=given.desc)


@each_kind
@only_cuda
@pytest.mark.parametrize("impl", ["fused", "capturable", None])
def test_cpu_load_state_dict(kind, device, impl):
    if impl is not None and not (impl in kind.supports or (impl == "capturable" and kind.capturable)):
        pytest.skip(f"{kind.cls.__name__} has no {impl}")
    for given in kind.optim_inputs("cpu"):
        p = Parameter(torch.tensor([0.1, 0.2]))
        opt = kind.cls([p], **given.kwargs)
        kind.give(p, torch.rand_like(p))
        opt.step()
        saved = deepcopy(opt.state_dict())
        if impl is not None:
            saved["param_groups"][0][impl] = True
        q = Parameter(p.detach().clone().to(device))
        other = kind.cls([q], **{**given.kwargs, **({impl: True} if impl is not None else {})})
        other.load_state_dict(saved)
        kind.give(q, torch.rand_like(q))
        other.step()
        assert all(v.device.type == "cuda" for key, v in other.state[q].items() if isinstance(v, torch.Tensor) and (impl == "capturable" or v.ndim))


@each_kind
@each_device
def test_param_groups_weight_decay(kind, device):
    for given in kind.all_inputs(device):
        weight, bias, closure = problem(kind, device)
        opt = kind.cls([dict(params=[weight], **kind.slowly(given.kwargs)), dict(params=[bias], **{**kind.slowly(given.kwargs), "weight_decay": 0.0})])
        before = closure().item()
        for _ in range(20):
            closure()
            opt.step()
        assert_right_direction(before, closure().item(), given)


@each_kind
@each_device
def test_param_groups_weight_decay_is_applied_to_its_group_alone(kind, device):
    for given in kind.all_inputs(device):
        params = [Parameter(torch.randn(4, 3, device=device)) for _ in range(2)]
        before = [p.detach().clone() for p in params]
        kwargs = {**given.kwargs, "lr": 0.1}
        opt = kind.cls([dict(params=params[:1], **{**kwargs, "weight_decay": 0.5}), dict(params=params[1:], **{**kwargs, "weight_decay": 0.0})])
        for p in params:
            kind.give(p, torch.zeros_like(p))
        opt.step()
        factor = 1 / 1.05 if kind is ADAN and not kwargs.get("no_prox") else 0.95
        CHECK.assertEqual([p.detach() for p in params], [before[0] * factor, before[1]])


@each_kind
@each_device
def test_param_groups_lr(kind, device):
    for given in kind.all_inputs(device):
        weight, bias, closure = problem(kind, device)
        still = Parameter(torch.randn(2, device=device))
        before_still = still.detach().clone()
        opt = kind.cls([dict(params=[weight, bias], **kind.slowly(given.kwargs)), dict(params=[still])], lr=1e-28)
        before = closure().item()
        for _ in range(20):
            closure()
            kind.give(still, torch.rand_like(still))
            opt.step()
        assert_right_direction(before, closure().item(), given)
        CHECK.assertEqual(still, before_still)


@each_kind
@each_device
def test_step_is_noop_when_params_have_no_grad(kind, device):
    for given in kind.all_inputs(device, skip=()):
        params = [torch.randn(2, 3, device=device) for _ in range(2)]
        before = [p.clone() for p in params]
        opt = kind.cls(params, **given.kwargs)
        assert opt.step(lambda: torch.tensor([1], device=device)).item() == 1
        assert all(torch.equal(p, q) for p, q in zip(params, before)) and not any(opt.state.values())


@each_kind
@each_device
def test_step_is_noop_for_zero_grads(kind, device):
    for given in kind.all_inputs(device, skip=()):
        kwargs = {**given.kwargs, "weight_decay": 0.0}  # decay is applied whatever the gradient
        param = torch.randn(5, 1, device=device, requires_grad=True)
        before = param.detach().clone()
        p = param.clone() if kwargs.get("differentiable") else param
        opt = kind.cls([p], **kwargs)
        kind.give(p, torch.zeros_like(p))
        opt.step(lambda: torch.tensor([1], device=device))
        assert torch.equal(p, before)


@each_kind
@each_device
def test_optimizer_can_be_printed(kind, device):
    for given in kind.all_inputs(device, skip=()):
        text = repr(kind.cls([Parameter(torch.randn(2, 3, device=device)) for _ in range(2)], **given.kwargs))
        assert text.startswith(f"{kind.cls.__name__} (") and all(name in text for name in kind.own_flags)


def named(params, do):
    return [(f"name{i}", p) for i, p in enumerate(params)] if do else params


def without_names(state_dict):
    return {**state_dict, "param_groups": [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]}


@each_kind
@each_device
@pytest.mark.parametrize("is_named_optim0", [True, False])
@pytest.mark.parametrize("is_named_optim1", [True, False])
def test_state_dict_deterministic(kind, device, is_named_optim0, is_named_optim1):
    for given in kind.all_inputs(device):
        weight, bias, _ = problem(kind, device)
        x = torch.randn(5, device=device)
        opt = kind.cls(named([weight, bias], is_named_optim0), **given.kwargs)
        for _ in range(10):
            evaluate(kind, weight, bias, x)
            opt.step()
        copies = [Parameter(p.detach().clone()) for p in (weight, bias)]
        other = kind.cls(named(copies, is_named_optim1), **given.kwargs)
        other.load_state_dict(deepcopy(opt.state_dict()))
        for _ in range(10):
            evaluate(kind, weight, bias, x), evaluate(kind, *copies, x)
            opt.step(), other.step()
            assert torch.equal(weight, copies[0]) and torch.equal(bias, copies[1])
        a, b = without_names(opt.state_dict()), without_names(other.state_dict())
        CHECK.assertEqual(a, b, rtol=0, atol=0)
        other.param_groups.extend(other.param_groups)
        CHECK.assertEqual(without_names(opt.state_dict())["param_groups"][-1], without_names(other.state_dict())["param_groups"][-1])


def conv_net(kind, device):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2)).to(device)
    x = torch.rand(1, 4, 16, 16, device=device)

    def closure():
        model.zero_grad()
        loss = (model(x) ** 3).sum()
        kind.backward(loss)
        return loss

    return model, closure


@each_kind
@each_device
def test_can_load_older_state_dict(kind, device):
    assert "maximize" in kind.own_flags and set(kind.supports) - {"foreach"} <= set(kind.own_flags) <= set(kind.cls([torch.ones(1)]).defaults)
    for given in kind.all_inputs(device):
        model, closure = conv_net(kind, device)
        opt = kind.cls(model.parameters(), **given.kwargs)
        for _ in range(3):
            opt.step(closure)
        old = deepcopy(opt.state_dict())
        for group in old["param_groups"]:
            for flag in kind.own_flags:
                group.pop(flag, None)
        opt.load_state_dict(old)
        for flag in kind.own_flags:  # what the file does not say is as the optimizer was built
            assert opt.param_groups[0][flag] == given.kwargs.get(flag, inspect.signature(kind.cls).parameters[flag].default)
        opt.step(closure)


@each_kind
@each_device
@pytest.mark.parametrize("is_named_optim0", [True, False])
@pytest.mark.parametrize("is_named_optim1", [True, False])
def test_can_load_from_to_named_state_dict(kind, device, is_named_optim0, is_named_optim1):
    for given in kind.all_inputs(device):
        model, closure = conv_net(kind, device)
        opt = kind.cls(model.named_parameters() if is_named_optim0 else model.parameters(), **given.kwargs)
        for _ in range(3):
            opt.step(closure)
        other = kind.cls(model.named_parameters() if is_named_optim1 else model.parameters(), **given.kwargs)
        other.load_state_dict(deepcopy(opt.state_dict()))
        other.step(closure)
        if is_named_optim0 or is_named_optim1:
            assert other.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@each_kind
@each_device
@pytest.mark.parametrize("is_named_optim", [True, False])
def test_save_load_equality_with_weights_only(kind, device, is_named_optim):
    for given in kind.all_inputs(device):
        weight, bias, closure = problem(kind, device)
        opt = kind.cls(named([weight, bias], is_named_optim), **given.kwargs, **({} if given.kwargs.get("fused") else dict(state_dtype=torch.float64)))
        for _ in range(3):
            opt.step(closure)
        saved = opt.state_dict()
        for weights_only in (False, True):
            with tempfile.TemporaryFile() as file:
                torch.save(saved, file)
                file.seek(0)
                CHECK.assertEqual(torch.load(file, weights_only=weights_only), saved, rtol=0, atol=0)


@each_device
def test_state_dict_keeps_the_kind_of_scale(device):
    def twice(grad):
        return 2.0

    def build(scale):
        p = Parameter(torch.ones(3, 2, device=device))
        p.grad = torch.randn_like(p)
        return SGDSaI([p], scale=scale)

    for mine, theirs, result in ((twice, "gsnr", "gsnr"), (twice, twice, twice), ("gsnr", twice, "gsnr"), ("sqrt_numel", "gsnr", "sqrt_numel")):
        opt, other = build(mine), build(theirs)
        opt.step()
        with tempfile.TemporaryFile() as file:
            torch.save(opt.state_dict(), file)
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True))
        assert other.param_groups[0]["scale"] is result or other.param_groups[0]["scale"] == result
        assert opt.param_groups[0]["scale"] is mine and opt.scales() == other.scales()


@each_device
@pytest.mark.parametrize("capturable", [False, True])
def test_state_dict_keeps_scales_that_were_set_by_hand(device, capturable):
    opts = [SGDSaI([("p", Parameter(torch.ones(4, device=device)))], capturable=capturable) for _ in range(2)]
    opts[0].set_scales({"p": 50.0})  # above max_ratio, which is about measured scales
    p = opts[0].param_groups[0]["params"][0]
    p.grad = torch.randn_like(p)
    opts[0].step()
    opts[1].load_state_dict(opts[0].state_dict())
    q = opts[1].param_groups[0]["params"][0]
    assert opts[1].scales() == {"p": 50.0} and torch.equal(opts[1].state[q]["momentum_buffer"], opts[0].state[p]["momentum_buffer"])


@each_kind
@each_device
def test_load_nontensor_step(kind, device):
    for given in kind.all_inputs(device):
        params = [Parameter(torch.randn(2, 3, device=device)) for _ in range(2)]
        opt = kind.cls(params, **given.kwargs)

        def step():
            for p in params:
                kind.give(p, torch.rand_like(p))
            opt.step()

        for _ in range(3):
            step()
        for t, convert in enumerate((lambda n: float(n), lambda n: torch.tensor(float(n)), lambda n: torch.tensor([float(n)])[0].to(device)), 4):
            numbers = [float(opt.state[p][kind.number]) for p in params]
            saved = deepcopy(opt.state_dict())
            for state in saved["state"].values():
                state[kind.number] = convert(state[kind.number])
            opt.load_state_dict(saved)
            step()
            now = [float(opt.state[p][kind.number]) for p in params]
            assert now == pytest.approx(numbers, rel=0 if isinstance(state["gsnr"], float) else 1e-7) if kind is SGDSAI else now == [t, t]
            expected = float if kind is SGDSAI and not given.kwargs.get("capturable") else torch.Tensor
            assert all(isinstance(opt.state[p][kind.number], expected) for p in params)


@each_kind
@only_cuda
def test_state_dict_with_cuda_params(kind, device):
    for given in kind.all_inputs("cpu"):
        params, grads = [Parameter(torch.randn(2, 3)) for _ in range(2)], [torch.randn(2, 3) for _ in range(2)]

        def step(opt, params):
            for p, g in zip(params, grads):
                kind.give(p, g.to(p.device))
            opt.step()

        opt = kind.cls(params, **given.kwargs)
        for _ in range(3):
            step(opt, params)
        cuda = [Parameter(p.detach().to(device)) for p in params]
        other = kind.cls(cuda, **given.kwargs)
        saved, kept = deepcopy(opt.state_dict()), deepcopy(opt.state_dict())
        other.load_state_dict(saved)
        CHECK.assertEqual(saved, kept)
        for q in cuda:
            assert all(v.device == q.device for v in other.state[q].values() if isinstance(v, torch.Tensor) and (v.ndim or given.kwargs.get("capturable")))
        for _ in range(5):
            step(opt, params), step(other, cuda)
            CHECK.assertEqual(params, cuda, exact_device=False)
            CHECK.assertEqual(opt.state_dict(), other.state_dict(), exact_device=False)


def one_param(kind, device, given):
    return kind.cls([torch.rand(2, 3, device=device, requires_grad=True)], **given.kwargs)


def state_dict_pre_hook(opt):
    opt.state["test"] = 1


def state_dict_post_hook(opt, state_dict):
    state_dict["ran_state_dict_pre_hook"] = state_dict["state"].pop("test", None) is not None
    return state_dict


@each_kind
@each_device
def test_state_dict_pre_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_state_dict_pre_hook(state_dict_pre_hook)
        assert opt.state_dict()["state"]["test"] == 1


@each_kind
@each_device
def test_state_dict_post_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_state_dict_post_hook(state_dict_post_hook)
        assert not opt.state_dict()["ran_state_dict_pre_hook"]


@each_kind
@each_device
def test_state_dict_pre_post_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_state_dict_pre_hook(state_dict_pre_hook)
        opt.register_state_dict_post_hook(state_dict_post_hook)
        saved = opt.state_dict()
        assert "test" not in saved["state"] and saved["ran_state_dict_pre_hook"]


def set_lr_in_place(opt, state_dict):
    state_dict["param_groups"][0]["lr"] = 0.002


def set_lr_in_a_copy(opt, state_dict):
    state_dict = deepcopy(state_dict)
    state_dict["param_groups"][0]["lr"] = 0.003
    return state_dict


def note_lr(opt):
    opt.state["ran_load_state_dict_pre_hook2"] = opt.param_groups[0]["lr"] == 0.003
    opt.state["ran_load_state_dict_post_hook"] = True


@each_kind
@each_device
def test_load_state_dict_pre_hook_and_prepend(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        saved = opt.state_dict()
        opt.register_load_state_dict_pre_hook(set_lr_in_place)
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.002
        opt.register_load_state_dict_pre_hook(set_lr_in_a_copy, prepend=True)
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.002  # the hook put in front is overridden by the other
        opt.register_load_state_dict_pre_hook(set_lr_in_a_copy)
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.003


@each_kind
@each_device
def test_load_state_dict_post_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_load_state_dict_post_hook(note_lr)
        opt.load_state_dict(opt.state_dict())
        assert not opt.state["ran_load_state_dict_pre_hook2"] and opt.state["ran_load_state_dict_post_hook"]


@each_kind
@each_device
def test_load_state_dict_pre_post_hook(kind, device):
    for given in kind.all_inputs(device, skip=()):
        opt = one_param(kind, device, given)
        opt.register_load_state_dict_pre_hook(set_lr_in_a_copy)
        opt.register_load_state_dict_post_hook(note_lr)
        opt.load_state_dict(opt.state_dict())
        assert opt.state["ran_load_state_dict_pre_hook2"] and opt.state["ran_load_state_dict_post_hook"]


@each_kind
@each_device
def test_load_state_dict_hooks_see_and_change_the_loaded_state(kind, device):
    p = Parameter(torch.randn(4, 3, device=device).bfloat16())
    kind.give(p, torch.randn_like(p))
    opt = kind.cls([p], state_dtype=torch.float32)
    opt.step()
    number, m = opt.state[p][kind.number], opt.state[p][kind.average].clone()
    seen = []

    def before(opt, saved):
        saved = deepcopy(saved)
        saved["state"][0][kind.average].mul_(2)
        return saved

    def after(opt):
        seen.append((opt.state[p][kind.number], opt.state[p][kind.average].clone()))
        opt.state[p][kind.average].add_(1)

    opt.register_load_state_dict_pre_hook(before)
    opt.register_load_state_dict_post_hook(after)
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert m.dtype == torch.float32
    assert seen[0][0] == number and torch.equal(seen[0][1], 2 * m)  # restored to the last bit before the hook runs
    assert torch.equal(opt.state[p][kind.average], 2 * m + 1)  # and what the hook does, stays
    assert len(opt._optimizer_load_state_dict_pre_hooks) == len(opt._optimizer_load_state_dict_post_hooks) == 1


def step_hook_runs_until_it_is_removed(kind, device, register):
    for given in kind.all_inputs(device, skip=()):
        opt, count = kind.cls([torch.tensor([1.0, 1.0], device=device)], **given.kwargs), []
        handle = getattr(opt, register)(lambda opt, args, kwargs: count.append(1))
        opt.step(), opt.step()
        assert len(count) == 2
        handle.remove()
        opt.step()
        assert len(count) == 2


@each_kind
@each_device
def test_step_pre_hook(kind, device):
    step_hook_runs_until_it_is_removed(kind, device, "register_step_pre_hook")


@each_kind
@each_device
def test_step_post_hook(kind, device):
    step_hook_runs_until_it_is_removed(kind, device, "register_step_post_hook")


@each_kind
@each_device
def test_step_all_hooks(kind, device):
    params = [torch.tensor([1.0, 1.0], device=device)]
    for given in kind.all_inputs(device, skip=()):
        order = []
        opts = [kind.cls(params, **given.kwargs), SGD(params)]
        handles = [register_optimizer_step_pre_hook(lambda *a: order.append(0)), register_optimizer_step_post_hook(lambda *a: order.append(5))]
        for opt in opts:
            handles.append(opt.register_step_pre_hook(lambda *a: order.append(1)))
            handles.append(opt.register_step_post_hook(lambda *a: order.append(2)))
        for n, opt in enumerate((opts[0], opts[1], opts[0]), 1):
            opt.step()
            assert order == [0, 1, 2, 5] * n
        for handle in handles:
            handle.remove()
        for opt in opts:
            opt.step()
        assert order == [0, 1, 2, 5] * 3


@each_kind
@each_device
def test_deepcopy_copies_all_public_attrs(kind, device):
    for given in kind.all_inputs(device):
        params = [Parameter(torch.randn(2, 3, device=device)) for _ in range(2)]
        opt = kind.cls(params, **given.kwargs)
        for _ in range(3):
            for p in params:
                kind.give(p, torch.rand_like(p))
            opt.step()
        twin = deepcopy(opt)
        assert [{name for name in vars(o) if not name.startswith("_")} for o in (opt, twin)] == [{"defaults", "state", "param_groups"}] * 2
        CHECK.assertEqual(twin.state_dict(), opt.state_dict(), rtol=0, atol=0)


def function_called(kind, name, p, **kwargs):
    "Whether a step of the parameter p calls this function of the optimizer's module."
    kind.give(p, torch.randn_like(p))
    opt = kind.cls([p], **kwargs)
    with patch.object(kind.module, name) as mocked:
        opt.step()
    return mocked.called


@with_foreach
@each_device
def test_defaults_changed_to_foreach(kind, device):
    large = {"cuda": "_foreach", "cpu": "_fused" if kind is SGDSAI else "_for_loop"}[device]
    for given in kind.optim_inputs(device):
        if not given.kwargs.get("restart_radius"):  # which needs to look at one parameter after the other
            assert function_called(kind, large, Parameter(torch.rand(5, 5, device=device)), **given.kwargs)
            assert kind is SGDSAI or function_called(kind, "_foreach", Parameter(torch.rand(2, 2, device=device)), **given.kwargs)


@pytest.mark.parametrize("kind, flags, expected", [
    (SGDSAI, dict(foreach=True), "_foreach"), (SGDSAI, dict(fused=True), "_fused"), (SGDSAI, dict(foreach=False), "_for_loop"),
    (SGDSAI, dict(fused=False), "_for_loop"), (SGDSAI, dict(differentiable=True), "_for_loop"), (ADAN, dict(foreach=True), "_foreach"),
    (ADAN, dict(foreach=False), "_for_loop"), (ADAN, dict(differentiable=True), "_step_differentiable"),
    (ADAN, dict(foreach=True, restart_radius=1.0), "_for_loop")], ids=lambda x: x.cls.__name__ if isinstance(x, Kind) else str(x))
@each_device
def test_flags_choose_the_implementation(kind, device, flags, expected):
    for n in (3, 30):
        p = torch.rand(n, device=device)
        assert function_called(kind, expected, p, **flags)


@each_kind
@each_device
def test_non_empty_state(kind, device):
    for given in kind.all_inputs(device):
        model = torch.nn.Linear(5, 5).to(device)
        opt = kind.cls(model.parameters(), **given.kwargs)
        kind.backward(model(torch.rand(2, 5, device=device)).square().sum())
        opt.step()
        for p in model.parameters():
            assert set(opt.state[p]) == kind.states(given.kwargs)


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fused_cpu_matches_cuda(device, dtype):
    for given in SGDSAI.optim_inputs("cpu"):
        models = [small_net(dtype, dev) for dev in ("cpu", device)]
        x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
        compare_between([x, x.to(device)], models, [SGDSaI(model.parameters(), **given.kwargs, fused=True) for model in models])


@with_foreach
@only_cuda
@pytest.mark.parametrize("foreach", [False, True])
def test_cuda_graph_equals_eager(kind, device, foreach):
    for given in kind.capturable_inputs(device):
        if given.kwargs.get("restart_radius"):
            continue
        runs = []
        start, grads = torch.randn(4, 3, device=device), torch.randn(6, 4, 3, device=device)
        for captured in (False, True):
            p = Parameter(start.clone())
            p.grad = grads[0].clone()
            opt = kind.cls([p], **deepcopy(given.kwargs), foreach=foreach)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = torch.cuda.CUDAGraph()
                if captured and kind is SGDSAI:
                    with pytest.raises(RuntimeError, match="no scale yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                        opt.step()
                    torch.cuda.synchronize()
                    p.data.copy_(start)
                opt.step()
                for t in range(1, 6):
                    p.grad.copy_(grads[t])
                    if captured and t == 3:
                        with torch.cuda.graph(graph):
                            opt.step()
                    graph.replay() if captured and t >= 3 else opt.step()
            runs.append(snapshot(opt, [p]))
        CHECK.assertEqual(*runs, msg=given.desc)


def after_step(kind, p, grad, number, states, kwargs, *hyperparameters):
    "Parameter and state after one differentiable step, as a function of tensors that gradcheck can vary."
    p = p.clone()
    p.grad = grad
    opt = kind.cls([p], differentiable=True, **{**kwargs, **dict(zip(("lr", "weight_decay"), hyperparameters))})
    opt.state[p].update({kind.number: number if isinstance(number, float) else number.clone(), **{key: value.clone() for key, value in states.items()}})
    opt.step()
    return (p, *(opt.state[p][key] for key in states))


def leaf(*shape):
    return torch.rand(shape, dtype=torch.float64, requires_grad=True)


DIFFERENTIABLE = [
    (SGDSAI, dict(lr=0.9)), (SGDSAI, dict(lr=0.9, weight_decay=0.1, maximize=True)), (SGDSAI, dict(lr=0.9, nesterov=True)), (SGDSAI, dict(lr=0.9, momentum=0.0)),
    (ADAN, dict(lr=0.9)), (ADAN, dict(lr=0.9, weight_decay=0.1, maximize=True)), (ADAN, dict(lr=0.9, weight_decay=0.1, no_prox=True)),
    (ADAN, dict(lr=0.9, betas=(0.5, 0.0, 0.9), eps=0.1)),
]


@pytest.mark.parametrize("kind, kwargs", DIFFERENTIABLE, ids=lambda x: x.cls.__name__ if isinstance(x, Kind) else str(x))
@only_cpu
def test_differentiable(kind, device, kwargs):
    keys = [key for key in kind.states(kwargs) if key != kind.number]
    number = 3.0 if kind is SGDSAI else torch.tensor(3.0)

    def f(p, grad, *rest):
        return after_step(kind, p, grad, number, dict(zip(keys, rest)), {k: v for k, v in kwargs.items() if k != "lr" or len(rest) == len(keys)}, *rest[len(keys):])

    assert torch.autograd.gradcheck(f, (leaf(10), leaf(10), *(leaf(10) for _ in keys)))
    assert torch.autograd.gradcheck(f, (leaf(10), leaf(10), *(leaf(10) for _ in keys), leaf(), leaf()))  # with lr and weight_decay


def meta_loss(kind, p, kwargs, n, lr, weight_decay):
    "Loss after n differentiable steps from a first gradient that starts everything; a scale is a given constant."
    p = p.clone()
    opt = kind.cls([("p", p)], differentiable=True, lr=lr, weight_decay=weight_decay, **kwargs)
    if kind is SGDSAI:
        opt.set_scales({"p": 3.0})
    weights = torch.linspace(0.1, 1, p.numel(), dtype=p.dtype)
    for _ in range(n):
        loss = ((p * weights).sum() - 7) ** 2
        p.grad, = torch.autograd.grad(loss, p, create_graph=True)
        opt.step()
    return ((p * weights).sum() - 7) ** 2


META = [(SGDSAI, dict()), (SGDSAI, dict(nesterov=True)), (SGDSAI, dict(momentum=0.0)), (SGDSAI, dict(maximize=True)),
        (ADAN, dict()), (ADAN, dict(no_prox=True)), (ADAN, dict(maximize=True, betas=(0.5, 0.5, 0.5)))]


@only_cpu
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind, kwargs", META, ids=lambda x: x.cls.__name__ if isinstance(x, Kind) else str(x))
def test_differentiable_lr_and_weight_decay(kind, device, kwargs, n):
    lr, wd = torch.tensor(0.01, dtype=torch.float64, requires_grad=True), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(meta_loss, kind), (leaf(10), kwargs, n, lr, wd))
    assert torch.autograd.gradcheck(partial(meta_loss, kind), (leaf(10), kwargs, n, 0.01, 0.3))


@with_foreach
@only_cpu
def test_differentiable_equals_the_ordinary_step(kind, device):
    for given in kind.optim_inputs(device):
        if given.kwargs.get("restart_radius"):
            continue
        start, grads = torch.randn(4, 3), torch.randn(5, 4, 3)
        runs = []
        for differentiable in (False, True):
            p = start.clone().requires_grad_()
            p = p.clone() if differentiable else p
            opt = kind.cls([p], **deepcopy(given.kwargs), differentiable=differentiable)
            for g in grads:
                p.grad = g.clone()
                opt.step()
            runs.append(p.detach())
        CHECK.assertEqual(*runs, msg=given.desc)


@only_cpu
def test_every_check_of_pytorch_has_a_counterpart_here(device):
    there = """optim_infos_do_not_specify_global_cliquey_kwargs errors forloop_goes_right_direction forloop_goes_right_direction_multigpu
        param_group_with_lrscheduler_goes_right_direction tensor_lr rosenbrock_sparse complex complex_2d foreach_matches_forloop mixed_device_dtype
        set_default_dtype_works_with_foreach foreach_large_tensor peak_memory_foreach fused_matches_forloop fused_error_on_params_on_meta
        fused_large_tensor fused_does_not_step_if_foundinf cpu_load_state_dict param_groups_weight_decay param_groups_lr
        step_is_noop_when_params_have_no_grad step_is_noop_for_zero_grads optimizer_can_be_printed state_dict_deterministic
        can_load_older_state_dict can_load_from_to_named_state_dict save_load_equality_with_weights_only load_nontensor_step
        state_dict_with_cuda_params state_dict_pre_hook state_dict_post_hook state_dict_pre_post_hook load_state_dict_pre_hook_and_prepend
        load_state_dict_post_hook load_state_dict_pre_post_hook step_post_hook step_pre_hook step_all_hooks deepcopy_copies_all_public_attrs
        fused_cpu_matches_cuda defaults_changed_to_foreach non_empty_state""".split()
    missing = [name for name in there if f"test_{name}" not in globals()]
    assert not missing and all(isinstance(kind.cls([torch.ones(1)]), Optimizer) for kind in (SGDSAI, ADAN, ADAHESSIAN)) and re.match(r"\d+\.\d+", torch.__version__)
