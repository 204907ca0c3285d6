'''PyTorch's own optimizer checks, for SGDSaI: the test names of its test/test_optim.py (TestOptimRenewed) and of its differentiable-optimizer tests,
the inputs of torch.testing._internal.common_optimizers. Each check runs on the CPU, and on CUDA where there is one.

What is skipped or differs, and why (SGD's own list has no skips outside of torch.compile's test mode):

| check | here | reason |
|---|---|---|
| test_rosenbrock_sparse | the error is checked | sparse gradients are refused by design, as G is a statistic of the whole tensor |
| test_complex, test_complex_2d | the real twin gets the complex tensor's scales by `set_scales` | G of a complex tensor is made of n moduli; the update, which is element-wise, is still compared exactly |
| test_second_order_optims_return_consistent_types | no such test | for optimizers that need a closure |
| test_load_nontensor_step | the number that may be tensor or float is `gsnr` | there is no `step` in the state |
| test_defaults_changed_to_foreach | looks for the function `_foreach` on CUDA, and for `_fused` on the CPU | names differ; on the CPU the fused kernel is the default |
| test_fused_does_not_step_if_foundinf, test_grad_scaling_autocast_fused_optimizers | through GradScaler alone | the fused kernel is called piece by piece without found_inf; the scaler unscales and skips the step itself |
| test_foreach_large_tensor, test_fused_large_tensor | gradients are random instead of zero; on the CPU the sizes given to the kernel are checked | with zero gradients nothing starts, so nothing would be tested; the CPU kernel is only given pieces |
| test_cpu_load_state_dict | as SGD: only on CUDA; and `capturable` also | SGD has no `capturable` |
| multigpu, test_mixed_device_dtype | need two GPUs; a version with mixed dtypes on one device runs everywhere | as in PyTorch |
| test_peak_memory_foreach | CUDA, as in PyTorch | its limit is about the CUDA allocator; tests/test_authors.py has a stricter one for the CPU |
| the checks of the loss's direction | lr 1e-3, SGD's default, where the input gives none | lr is multiplied by G here, and the momentum starts with the whole first gradient |
| capturable inputs | run on the CPU too | stricter: SGDSaI supports them there |
'''
import inspect
import itertools
import re
import tempfile
import warnings
from copy import deepcopy
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
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

import sgd_sai.optimizer
from sgd_sai.optimizer import SGD_sai, SGDSaI


def optim_inputs(device, dtype=None):
    "Keyword arguments to build SGDSaI with: those of SGD where they exist here, and our own. The implementations are added by PyTorch."
    table = {
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
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in table.items()]


def capturable_inputs(device, dtype=None):
    "As above with `capturable`, which excludes the fused kernel."
    return [OptimizerInput(params=None, kwargs={**i.kwargs, "capturable": True}, desc=f"{i.desc} & capturable") for i in optim_inputs(device)]


def optim_error_inputs(device, dtype):
    "What PyTorch demands of every optimizer, of SGD, and errors of our own hyperparameters."
    def error(match, error_type=ValueError, params=None, error_on=OptimizerErrorEnum.CONSTRUCTION_ERROR, **kwargs):
        params = [Parameter(torch.randn(2, 2, device=device, dtype=dtype))] if params is None else params
        return ErrorOptimizerInput(OptimizerInput(params=params, kwargs=kwargs, desc=match), error_on=error_on, error_type=error_type, error_regex=match)

    sparse = Parameter(torch.randn(2, 2, device=device, dtype=dtype))
    sparse.grad = torch.randn(2, 2, device=device, dtype=dtype).to_sparse()
    infinite = Parameter(torch.randn(2, 2, device=device, dtype=dtype))
    infinite.grad = torch.full_like(infinite, torch.inf)
    return get_error_inputs_for_all_optims(device, dtype) + [
        error("Invalid momentum value: -0.5", momentum=-0.5),
        error("Invalid momentum value: 1.0", momentum=1.0),
        error("Invalid learning rate: -0.1", lr=-0.1),
        error("Invalid learning rate: nan", lr=float("nan")),
        error("Invalid weight_decay value: -1", weight_decay=-1),
        error("Invalid epsilon value: -1e-08", eps=-1e-8),
        error("Nesterov momentum requires a momentum", nesterov=True, momentum=0),
        error("Invalid scale: 'sqrt'", scale="sqrt"),
        error("Invalid max_ratio value: 0.5", max_ratio=0.5),
        error("Invalid state_dtype value: torch.int32", state_dtype=torch.int32),
        error("`fused` and `foreach` cannot be `True` together", RuntimeError, fused=True, foreach=True),
        error("`fused` does not support `differentiable`", RuntimeError, fused=True, differentiable=True),
        error("`foreach` does not support `differentiable`", RuntimeError, foreach=True, differentiable=True),
        error("`fused` does not support `capturable`", RuntimeError, fused=True, capturable=True),
        error("`fused=True` requires all the params to be floating point", RuntimeError, [torch.zeros(2, dtype=torch.complex64)], fused=True),
        error("Invalid momentum value: 2", params=[{"params": [infinite]}, {"params": [sparse], "momentum": 2}]),
        error("does not support sparse gradients", RuntimeError, [sparse], OptimizerErrorEnum.STEP_ERROR),
        error("is not finite", RuntimeError, [infinite], OptimizerErrorEnum.STEP_ERROR),
    ]


SGD_INFO = next(info for info in optim_db if info.optim_cls is SGD)
COMMON = dict(
    scheduler_inputs=SGD_INFO.scheduler_inputs,
    not_og_supported_flags=tuple(name for name in inspect.signature(SGDSaI).parameters if name not in inspect.signature(SGD_sai).parameters),
    supports_sparse=False, has_capturable_arg=True, supports_complex=True, supports_fused_on=("cpu", "cuda"),
    optim_error_inputs_func=optim_error_inputs,
)
INFO = OptimizerInfo(SGDSaI, optim_inputs_func=optim_inputs, supported_impls=("foreach", "differentiable", "fused"), **COMMON)
CAPTURABLE = OptimizerInfo(SGDSaI, optim_inputs_func=capturable_inputs, supported_impls=("foreach", "differentiable"), **COMMON)

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")
CHECK = TestCase()  # for assertEqual, with PyTorch's tolerances
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one GPU")]
each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
only_cuda = pytest.mark.parametrize("device", [CUDA])
only_cpu = pytest.mark.parametrize("device", ["cpu"])


def plain_inputs(device):
    return optim_inputs(device) + capturable_inputs(device)


def all_inputs(device, skip=("differentiable",)):
    "Every input with every implementation that goes with it."
    full = _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, INFO, skip=skip)
    return full + _get_optim_inputs_including_global_cliquey_kwargs(device, torch.float32, CAPTURABLE, skip=tuple(s for s in skip if s != "fused"))


def problem(device, dtype=torch.float32, contiguous=True, bias_device=None):
    "weight, bias, and a function that fills their gradients and returns the loss."
    if contiguous:
        weight, bias = Parameter(torch.randn(10, 5, device=device, dtype=dtype)), Parameter(torch.randn(10, device=bias_device or device, dtype=dtype))
    else:
        weight = Parameter(torch.randn(10, 5, 2, device=device, dtype=dtype)[..., 0])
        bias = Parameter(torch.randn(10, 2, device=device, dtype=dtype)[..., 0])
    x = torch.randn(5, device=device, dtype=dtype)
    return weight, bias, partial(evaluate, weight, bias, x)


def evaluate(weight, bias, x):
    weight.grad = bias.grad = None
    loss = (weight.mv(x).to(bias.device) + bias).pow(2).sum()
    loss.backward()
    return loss


def slowly(kwargs):
    "The keyword arguments with SGD's default rate: ours, times G, overshoots in the first twenty steps of these steep little problems."
    return {"lr": 1e-3, **kwargs}


def step_schedulers(schedulers, loss):
    for scheduler in schedulers:
        scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


def assert_right_direction(before, after, kwargs):
    assert after > before if kwargs.get("maximize") else after < before


def snapshot(opt, params):
    "Parameters and state as one structure that assertEqual can compare."
    return [p.detach().clone() for p in params], [{k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state[p].items()} for p in params]


@only_cpu
def test_optim_infos_do_not_specify_global_cliquey_kwargs(device):
    assert len(plain_inputs(device)) > 20
    assert not any(flag in i.kwargs for i in plain_inputs(device) for flag in ("foreach", "fused", "differentiable"))


@only_cpu
def test_errors(device):
    for case in optim_error_inputs(device, torch.float32):
        given = case.optimizer_error_input
        params = given.params if given.params is not None else [Parameter(torch.randn(2, 2))]
        expect = partial(pytest.warns if issubclass(case.error_type, Warning) else pytest.raises, case.error_type, match=case.error_regex)
        if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with expect():
                SGDSaI(params, **given.kwargs)
        else:
            opt = SGDSaI(params, **given.kwargs)
            with expect():
                opt.step()


@only_cpu
def test_error_in_a_later_group_leaves_the_optimizer_as_it_was(device):
    opt = SGDSaI([Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        opt.add_param_group({"params": [Parameter(torch.ones(2))], "lr": -1})
    assert len(opt.param_groups) == 1


@each_device
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_forloop_goes_right_direction(device, contiguous, with_lrsched):
    for make_schedulers in INFO.scheduler_inputs if with_lrsched else [[]]:
        for given in plain_inputs(device):
            weight, bias, closure = problem(device, contiguous=contiguous)
            opt = SGDSaI([weight, bias], **slowly(given.kwargs), foreach=False, fused=False)
            schedulers = [make(opt) for make in make_schedulers]
            before = closure().item()
            for _ in range(20):
                loss = closure()
                opt.step()
                step_schedulers(schedulers, loss)
            assert_right_direction(before, closure().item(), given.kwargs)


@pytest.mark.parametrize("device", [pytest.param("cuda:0", marks=TWO_GPUS)])
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_forloop_goes_right_direction_multigpu(device, with_lrsched):
    for make_schedulers in INFO.scheduler_inputs if with_lrsched else [[]]:
        for given in plain_inputs(device):
            weight, bias, closure = problem(device, bias_device="cuda:1")
            opt = SGDSaI([weight, bias], **slowly(given.kwargs), foreach=False, fused=False)
            schedulers = [make(opt) for make in make_schedulers]
            before = closure().item()
            for _ in range(20):
                step_schedulers(schedulers, opt.step(closure))
            assert_right_direction(before, closure().item(), given.kwargs)


@each_device
def test_param_group_with_lrscheduler_goes_right_direction(device):
    for make_schedulers in INFO.scheduler_inputs:
        for flags in ({}, dict(foreach=False, fused=False), dict(foreach=True), dict(fused=True), dict(capturable=True)):
            weight, bias, closure = problem(device)
            opt = SGDSaI([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **slowly(flags))
            schedulers = [make(opt) for make in make_schedulers]
            before = closure().item()
            for _ in range(20):
                step_schedulers(schedulers, opt.step(closure))
            assert closure().item() < before


@each_device
@pytest.mark.parametrize("num_dim", [0, 1, 2])
def test_tensor_lr(device, num_dim):
    for given, lr_device in itertools.product(all_inputs(device), {device, "cpu"}):
        weight, bias, _ = problem(device)
        x = torch.randn(5, device=device)
        twins = [Parameter(p.detach().clone()) for p in (weight, bias)]
        kwargs = {**given.kwargs, "lr": 1e-3}
        opt = SGDSaI([weight, bias], **kwargs)
        opt_t = SGDSaI(twins, **{**kwargs, "lr": torch.tensor(1e-3).reshape([1] * num_dim).to(lr_device)})
        for _ in range(5):
            evaluate(weight, bias, x), evaluate(*twins, x)
            opt.step(), opt_t.step()
            CHECK.assertEqual([weight, bias], twins, msg=given.desc)
        assert weight.shape == (10, 5) and isinstance(opt_t.param_groups[0]["lr"], torch.Tensor)


@each_device
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_tensor_lr_is_followed_when_it_changes(device, with_lrsched):
    for flags in (dict(foreach=False, fused=False), dict(foreach=True), dict(fused=True), dict(capturable=True), dict(capturable=True, foreach=True)):
        weight, bias, _ = problem(device)
        x = torch.randn(5, device=device)
        twins = [Parameter(p.detach().clone()) for p in (weight, bias)]
        lr = torch.tensor(1e-3, device=device)
        opts = SGDSaI([weight, bias], lr=1e-3, **flags), SGDSaI(twins, lr=lr, **flags)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in opts] if with_lrsched else []
        for t in range(4):
            evaluate(weight, bias, x), evaluate(*twins, x)
            opts[0].step(), opts[1].step()
            step_schedulers(schedulers, None)
            if not with_lrsched:
                opts[0].param_groups[0]["lr"] *= 0.5
                lr.mul_(0.5)
            CHECK.assertEqual([weight, bias], twins)
        assert opts[1].param_groups[0]["lr"] is lr and lr.item() == pytest.approx(1e-3 / 16)


@each_device
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_rosenbrock_sparse(device, with_lrsched):
    for given in all_inputs(device):
        p = Parameter(torch.tensor([1.5, 1.5], device=device))
        opt = SGDSaI([("point", p)], **given.kwargs)
        if with_lrsched:
            for make in SGD_INFO.metadata_for_sparse[1]:
                make(opt)
        for dense_first in (False, True):
            p.grad = torch.sparse_coo_tensor([[0, 0]], [0.3, 0.7], (2,), device=device)
            before = p.detach().clone()
            with pytest.raises(RuntimeError, match="SGDSaI does not support sparse gradients, which parameter point has: build its layer with sparse=False"):
                opt.step()
            assert torch.equal(p, before)
            p.grad = torch.tensor([0.3, -0.7], device=device)
            opt.step()
            assert not torch.equal(p, before)


def real_twins(params):
    return [torch.view_as_real(p).detach().clone().requires_grad_() if p.is_complex() else p.detach().clone().requires_grad_() for p in params]


@each_device
def test_complex(device):
    for given in all_inputs(device, skip=("differentiable", "fused")):
        shapes = [((10, 5), torch.complex64), ((10,), torch.complex64), ((10, 5), torch.float32)]  # the last is real, so that they are mixed
        params = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape, dtype in shapes]
        twins = real_twins(params)
        opt, opt_r = SGDSaI(params, **given.kwargs), SGDSaI(twins, **given.kwargs)
        for t in range(3):
            for p, q in zip(params, twins):
                q.grad = torch.randn_like(q)
                p.grad = torch.view_as_complex(q.grad.clone()) if p.is_complex() else q.grad.clone()
            if t == 0:
                n = {p: p.numel() for p in params}
                sgd_sai.optimizer.start(opt)
                opt_r.set_scales({name: float(opt.state[p]["gsnr"]) for (name, _), p in zip(opt_r.named(), params)})
                if given.kwargs.get("scale") != "sqrt_numel":  # n moduli, and the standard deviation of complex numbers
                    for p in params:
                        eps = given.kwargs.get("eps", 1e-8)
                        assert float(opt.state[p]["gsnr"]) == pytest.approx((p.grad.norm() / (p.grad.std() + eps)).item(), rel=1e-5)
                assert all(float(opt.state[p]["gsnr"]) <= 1.5 * n[p] ** 0.5 for p in params)
            opt.step(), opt_r.step()
            CHECK.assertEqual([torch.view_as_real(p) if p.is_complex() else p for p in params], twins, msg=given.desc)
            CHECK.assertEqual([opt_r.state[q].get("momentum_buffer") for q in twins],
                              [torch.view_as_real(m) if m is not None and m.is_complex() else m for m in (opt.state[p].get("momentum_buffer") for p in params)])


def rosenbrock(point):
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@each_device
def test_complex_2d(device):
    for given in all_inputs(device, skip=("differentiable", "fused")):
        a = torch.randn(2, device=device, dtype=torch.complex64, requires_grad=True)
        re_, im = a.real.detach().clone().requires_grad_(), a.imag.detach().clone().requires_grad_()
        kwargs = {"lr": 1e-5, **given.kwargs} if "lr" not in given.kwargs else {**given.kwargs, "lr": 1e-5}
        opt, parts = SGDSaI([a], **kwargs), SGDSaI([re_, im], **kwargs)
        for t in range(3):
            opt.zero_grad(), parts.zero_grad()
            rosenbrock(a).abs().backward()
            with torch.no_grad():
                re_.copy_(a.real), im.copy_(a.imag)  # rounding must not add up through the steep function
            rosenbrock(torch.complex(re_, im)).abs().backward()
            CHECK.assertEqual(a.grad.real, re_.grad)
            CHECK.assertEqual(a.grad.imag, im.grad)
            re_.grad, im.grad = a.grad.real.clone(), a.grad.imag.clone()
            if t == 0:
                sgd_sai.optimizer.start(opt)
                parts.set_scales({name: float(opt.state[a]["gsnr"]) for name, _ in parts.named()})
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


def derived_optimizers(device, dtype, flag, **tolerance):
    for given in plain_inputs(device):
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
            opts.append(SGDSaI([*model.parameters(), scalar, empty], **{**given.kwargs, flag: value, "fused" if flag == "foreach" else "foreach": False}))
            models.append(model)
        compare_between([x, x], models, opts, **tolerance)


@each_device
def test_foreach_matches_forloop(device):
    derived_optimizers(device, torch.float64, "foreach")


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fused_matches_forloop(device, dtype):
    derived_optimizers(device, dtype, "fused")


DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("devices", [["cpu"], pytest.param(["cuda:0"], marks=pytest.mark.gpu), pytest.param(["cuda:0", "cuda:1"], marks=TWO_GPUS)], ids=str)
@pytest.mark.parametrize("impl", ["foreach", "fused"])
def test_mixed_device_dtype(devices, impl):
    params = [torch.rand(2, 3, dtype=dtype, device=device, requires_grad=True) for device in devices for dtype in DTYPES]
    grads = [torch.rand_like(p) for p in params]
    for given in plain_inputs(devices[0]):
        if impl == "fused" and given.kwargs.get("capturable"):
            continue
        results = []
        for use in (False, True):
            clones = [p.detach().clone().requires_grad_() for p in params]
            opt = SGDSaI(clones, **{**given.kwargs, impl: use})
            for _ in range(7 if impl == "foreach" else 1):
                for p, g in zip(clones, grads):
                    p.grad = g.clone()
                opt.step()
            results.append(snapshot(opt, clones))
        for p, q, s, t in zip(*results[0][:1], *results[1][:1], results[0][1], results[1][1]):
            rtol, atol = torch.testing._comparison.get_tolerances(p.dtype, rtol=None, atol=None)
            CHECK.assertEqual(q, p, rtol=5 * rtol, atol=5 * atol)
            CHECK.assertEqual(t, s, rtol=5 * rtol, atol=5 * atol)


@each_device
def test_set_default_dtype_works_with_foreach(device):
    before = torch.get_default_dtype()
    for default in (torch.float64, torch.float16):
        try:
            torch.set_default_dtype(default)
            derived_optimizers(device, torch.float64, "foreach", **(dict(atol=1e-5, rtol=1e-4) if default == torch.float16 else {}))
            p = Parameter(torch.randn(3, 2, dtype=torch.float32, device=device))
            p.grad = torch.randn_like(p)
            opt = SGDSaI([p], capturable=True)
            opt.step()
            assert opt.state[p]["gsnr"].dtype == torch.float32
        finally:
            torch.set_default_dtype(before)


def large_tensor_step(given, **flags):
    p = torch.ones(2**32, device="cuda", dtype=torch.float16)
    p.grad = torch.empty_like(p).normal_()
    SGDSaI([p], **flags, **given.kwargs).step()
    assert p[-1] != 1 and p[2**31] != 1


@only_cuda
@pytest.mark.parametrize("flag", ["foreach"])
def test_foreach_large_tensor(device, flag):
    if torch.cuda.mem_get_info()[0] < 72e9:
        pytest.skip("needs 72 GB of GPU memory")
    for given in optim_inputs(device)[:3]:
        large_tensor_step(given, foreach=True)


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
    for given in optim_inputs(device)[:3]:
        large_tensor_step(given, fused=True)


@only_cuda
def test_peak_memory_foreach(device):
    for given in plain_inputs(device):
        peaks = []
        for flag in (False, True):
            params = [torch.rand(16, 8, device=device) for _ in range(10)]  # 512 bytes, the block size of the allocator
            for p in params:
                p.grad = torch.rand_like(p)
            opt = SGDSaI(params, **given.kwargs, foreach=flag, fused=False)
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
    for given in optim_inputs(device):
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


@each_device
@pytest.mark.parametrize("impl", ["forloop", "foreach", "fused"])
def test_grad_scaling_autocast_fused_optimizers(device, impl):
    flags = {"forloop": dict(foreach=False, fused=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}[impl]
    for given in optim_inputs(device):
        runs = []
        for scaled in (False, True):
            model, x = small_net(torch.float32, device), torch.ones(3, 2, device=device)
            opt, scaler = SGDSaI(model.parameters(), **deepcopy(given.kwargs), **flags), torch.amp.GradScaler(device, init_scale=128.0, enabled=scaled)
            for _ in range(4):
                opt.zero_grad()
                with torch.autocast(device, torch.bfloat16):
                    loss = model(x).float().sum()
                scaler.scale(loss).backward()
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
                scaler.step(opt)
                scaler.update()
            runs.append(snapshot(opt, model.parameters()))
        CHECK.assertEqual(*runs, msg=given.desc)


@only_cuda
@pytest.mark.parametrize("impl", ["fused", "capturable"])
def test_cpu_load_state_dict(device, impl):
    for given in optim_inputs("cpu"):
        p = torch.tensor([0.1, 0.2])
        opt = SGDSaI([p], **given.kwargs)
        p.grad = torch.rand_like(p)
        opt.step()
        saved = deepcopy(opt.state_dict())
        saved["param_groups"][0][impl] = True
        q = p.detach().clone().to(device)
        other = SGDSaI([q], **{**given.kwargs, impl: True})
        other.load_state_dict(saved)
        q.grad = torch.rand_like(q)
        other.step()
        assert all(v.device.type == "cuda" for v in other.state[q].values() if isinstance(v, torch.Tensor))


@each_device
def test_param_groups_weight_decay(device):
    for given in all_inputs(device):
        weight, bias, closure = problem(device)
        opt = SGDSaI([dict(params=[weight], **slowly(given.kwargs)), dict(params=[bias], **{**slowly(given.kwargs), "weight_decay": 0.0})])
        before = closure().item()
        for _ in range(20):
            closure()
            opt.step()
        assert_right_direction(before, closure().item(), given.kwargs)


@each_device
def test_param_groups_weight_decay_is_applied_to_its_group_alone(device):
    for given in all_inputs(device):
        params = [Parameter(torch.randn(4, 3, device=device)) for _ in range(2)]
        before = [p.detach().clone() for p in params]
        kwargs = {**given.kwargs, "lr": 0.1}
        opt = SGDSaI([dict(params=params[:1], **{**kwargs, "weight_decay": 0.5}), dict(params=params[1:], **{**kwargs, "weight_decay": 0.0})])
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
        CHECK.assertEqual([p.detach() for p in params], [before[0] * 0.95, before[1]])


@each_device
def test_param_groups_lr(device):
    for given in all_inputs(device):
        weight, bias, closure = problem(device)
        still = Parameter(torch.randn(2, device=device))
        before_still = still.detach().clone()
        opt = SGDSaI([dict(params=[weight, bias], **slowly(given.kwargs)), dict(params=[still])], lr=1e-28)
        before = closure().item()
        for _ in range(20):
            closure()
            still.grad = torch.rand_like(still)
            opt.step()
        assert_right_direction(before, closure().item(), given.kwargs)
        CHECK.assertEqual(still, before_still)


@each_device
def test_step_is_noop_when_params_have_no_grad(device):
    for given in all_inputs(device, skip=()):
        params = [torch.randn(2, 3, device=device) for _ in range(2)]
        before = [p.clone() for p in params]
        opt = SGDSaI(params, **given.kwargs)
        assert opt.step(lambda: torch.tensor([1], device=device)).item() == 1
        assert all(torch.equal(p, q) for p, q in zip(params, before)) and not any(opt.state.values())


@each_device
def test_step_is_noop_for_zero_grads(device):
    for given in all_inputs(device, skip=()):
        kwargs = {**given.kwargs, "weight_decay": 0.0}  # decay is applied whatever the gradient
        param = torch.randn(5, 1, device=device, requires_grad=True)
        before = param.detach().clone()
        p = param.clone() if kwargs.get("differentiable") else param
        opt = SGDSaI([p], **kwargs)
        p.grad = torch.zeros_like(p)
        opt.step(lambda: torch.tensor([1], device=device))
        assert torch.equal(p, before)


@each_device
def test_optimizer_can_be_printed(device):
    for given in all_inputs(device, skip=()):
        text = repr(SGDSaI([Parameter(torch.randn(2, 3, device=device)) for _ in range(2)], **given.kwargs))
        assert text.startswith("SGDSaI (") and "max_ratio" in text


def named(params, do):
    return [(f"name{i}", p) for i, p in enumerate(params)] if do else params


def without_names(state_dict):
    return {**state_dict, "param_groups": [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]}


@each_device
@pytest.mark.parametrize("is_named_optim0", [True, False])
@pytest.mark.parametrize("is_named_optim1", [True, False])
def test_state_dict_deterministic(device, is_named_optim0, is_named_optim1):
    for given in all_inputs(device):
        weight, bias, closure = problem(device)
        opt = SGDSaI(named([weight, bias], is_named_optim0), **given.kwargs)
        for _ in range(10):
            closure()
            opt.step()
        copies = [Parameter(p.detach().clone()) for p in (weight, bias)]
        other = SGDSaI(named(copies, is_named_optim1), **given.kwargs)
        other.load_state_dict(deepcopy(opt.state_dict()))
        for _ in range(10):
            closure()
            for p, q in zip((weight, bias), copies):
                q.grad = p.grad.clone()
            opt.step(), other.step()
            assert torch.equal(weight, copies[0]) and torch.equal(bias, copies[1])
        a, b = without_names(opt.state_dict()), without_names(other.state_dict())
        CHECK.assertEqual(a, b, rtol=0, atol=0)
        other.param_groups.extend(other.param_groups)
        CHECK.assertEqual(without_names(opt.state_dict())["param_groups"][-1], without_names(other.state_dict())["param_groups"][-1])


def conv_net(device):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2)).to(device)
    x = torch.rand(1, 4, 16, 16, device=device)

    def closure():
        model.zero_grad()
        loss = (model(x) ** 3).sum()
        loss.backward()
        return loss

    return model, closure


@each_device
def test_can_load_older_state_dict(device):
    assert {"foreach", "fused", "differentiable", "maximize", "capturable", "nesterov"} <= set(INFO.not_og_supported_flags)
    for given in all_inputs(device):
        model, closure = conv_net(device)
        opt = SGDSaI(model.parameters(), **given.kwargs)
        for _ in range(3):
            opt.step(closure)
        old = deepcopy(opt.state_dict())
        for group in old["param_groups"]:
            for flag in INFO.not_og_supported_flags:
                group.pop(flag, None)
        opt.load_state_dict(old)
        for flag in INFO.not_og_supported_flags:  # what the file does not say is as the optimizer was built
            assert opt.param_groups[0][flag] == given.kwargs.get(flag, inspect.signature(SGDSaI).parameters[flag].default)
        opt.step(closure)


@each_device
@pytest.mark.parametrize("is_named_optim0", [True, False])
@pytest.mark.parametrize("is_named_optim1", [True, False])
def test_can_load_from_to_named_state_dict(device, is_named_optim0, is_named_optim1):
    for given in all_inputs(device):
        model, closure = conv_net(device)
        opt = SGDSaI(model.named_parameters() if is_named_optim0 else model.parameters(), **given.kwargs)
        for _ in range(3):
            opt.step(closure)
        other = SGDSaI(model.named_parameters() if is_named_optim1 else model.parameters(), **given.kwargs)
        other.load_state_dict(deepcopy(opt.state_dict()))
        other.step(closure)
        if is_named_optim0 or is_named_optim1:
            assert other.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"] == list(other.scales())


@each_device
@pytest.mark.parametrize("is_named_optim", [True, False])
def test_save_load_equality_with_weights_only(device, is_named_optim):
    for given in all_inputs(device):
        weight, bias, closure = problem(device)
        opt = SGDSaI(named([weight, bias], is_named_optim), **given.kwargs, **({} if given.kwargs.get("fused") else dict(state_dtype=torch.float64)))
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


@each_device
def test_load_nontensor_step(device):
    for given in all_inputs(device):
        params = [Parameter(torch.randn(2, 3, device=device)) for _ in range(2)]
        for p in params:
            p.grad = torch.rand_like(p)
        opt = SGDSaI(params, **given.kwargs)
        for _ in range(3):
            opt.step()
        scales = opt.scales()
        for convert in (lambda G: float(G), lambda G: torch.tensor(float(G)), lambda G: torch.tensor([float(G)])[0].to(device)):
            saved = deepcopy(opt.state_dict())
            for state in saved["state"].values():
                state["gsnr"] = convert(state["gsnr"])
            opt.load_state_dict(saved)
            opt.step()
            assert opt.scales() == pytest.approx(scales, rel=0 if isinstance(state["gsnr"], float) else 1e-7)
            assert all(isinstance(opt.state[p]["gsnr"], torch.Tensor if given.kwargs.get("capturable") else float) for p in params)


@only_cuda
def test_state_dict_with_cuda_params(device):
    for given in all_inputs("cpu"):
        params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
        for p in params:
            p.grad = torch.randn_like(p)
        opt = SGDSaI(params, **given.kwargs)
        for _ in range(3):
            opt.step()
        cuda = [Parameter(p.detach().to(device)) for p in params]
        for p, q in zip(params, cuda):
            q.grad = p.grad.to(device)
        other = SGDSaI(cuda, **given.kwargs)
        saved, kept = deepcopy(opt.state_dict()), deepcopy(opt.state_dict())
        other.load_state_dict(saved)
        CHECK.assertEqual(saved, kept)
        for q in cuda:
            assert all(v.device == q.device for v in other.state[q].values() if isinstance(v, torch.Tensor))
        for _ in range(5):
            opt.step(), other.step()
            CHECK.assertEqual(params, cuda, exact_device=False)
            CHECK.assertEqual(opt.state_dict(), other.state_dict(), exact_device=False)


def one_param(device, given):
    return SGDSaI([torch.rand(2, 3, device=device, requires_grad=True)], **given.kwargs)


def state_dict_pre_hook(opt):
    opt.state["test"] = 1


def state_dict_post_hook(opt, state_dict):
    state_dict["ran_state_dict_pre_hook"] = state_dict["state"].pop("test", None) is not None
    return state_dict


@each_device
def test_state_dict_pre_hook(device):
    for given in all_inputs(device, skip=()):
        opt = one_param(device, given)
        opt.register_state_dict_pre_hook(state_dict_pre_hook)
        assert opt.state_dict()["state"]["test"] == 1


@each_device
def test_state_dict_post_hook(device):
    for given in all_inputs(device, skip=()):
        opt = one_param(device, given)
        opt.register_state_dict_post_hook(state_dict_post_hook)
        assert not opt.state_dict()["ran_state_dict_pre_hook"]


@each_device
def test_state_dict_pre_post_hook(device):
    for given in all_inputs(device, skip=()):
        opt = one_param(device, given)
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


@each_device
def test_load_state_dict_pre_hook_and_prepend(device):
    for given in all_inputs(device, skip=()):
        opt = one_param(device, given)
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


@each_device
def test_load_state_dict_post_hook(device):
    for given in all_inputs(device, skip=()):
        opt = one_param(device, given)
        opt.register_load_state_dict_post_hook(note_lr)
        opt.load_state_dict(opt.state_dict())
        assert not opt.state["ran_load_state_dict_pre_hook2"] and opt.state["ran_load_state_dict_post_hook"]


@each_device
def test_load_state_dict_pre_post_hook(device):
    for given in all_inputs(device, skip=()):
        opt = one_param(device, given)
        opt.register_load_state_dict_pre_hook(set_lr_in_a_copy)
        opt.register_load_state_dict_post_hook(note_lr)
        opt.load_state_dict(opt.state_dict())
        assert opt.state["ran_load_state_dict_pre_hook2"] and opt.state["ran_load_state_dict_post_hook"]


@each_device
def test_load_state_dict_hooks_see_and_change_the_loaded_state(device):
    p = Parameter(torch.randn(4, 3, device=device).bfloat16())
    p.grad = torch.randn_like(p)
    opt = SGDSaI([p], state_dtype=torch.float32)
    opt.step()
    G, m = opt.state[p]["gsnr"], opt.state[p]["momentum_buffer"].clone()
    seen = []

    def before(opt, saved):
        saved = deepcopy(saved)
        saved["state"][0]["momentum_buffer"].mul_(2)
        return saved

    def after(opt):
        seen.append((opt.state[p]["gsnr"], opt.state[p]["momentum_buffer"].clone()))
        opt.state[p]["momentum_buffer"].add_(1)

    opt.register_load_state_dict_pre_hook(before)
    opt.register_load_state_dict_post_hook(after)
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert seen[0][0] == G and torch.equal(seen[0][1], 2 * m)  # restored to the last bit before the hook runs
    assert torch.equal(opt.state[p]["momentum_buffer"], 2 * m + 1)  # and what the hook does, stays
    assert len(opt._optimizer_load_state_dict_pre_hooks) == len(opt._optimizer_load_state_dict_post_hooks) == 1


def step_hook_runs_until_it_is_removed(device, register):
    for given in all_inputs(device, skip=()):
        opt, count = SGDSaI([torch.tensor([1.0, 1.0], device=device)], **given.kwargs), []
        handle = getattr(opt, register)(lambda opt, args, kwargs: count.append(1))
        opt.step(), opt.step()
        assert len(count) == 2
        handle.remove()
        opt.step()
        assert len(count) == 2


@each_device
def test_step_pre_hook(device):
    step_hook_runs_until_it_is_removed(device, "register_step_pre_hook")


@each_device
def test_step_post_hook(device):
    step_hook_runs_until_it_is_removed(device, "register_step_post_hook")


@each_device
def test_step_all_hooks(device):
    params = [torch.tensor([1.0, 1.0], device=device)]
    for given in all_inputs(device, skip=()):
        order = []
        opts = [SGDSaI(params, **given.kwargs), SGD(params)]
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


@each_device
def test_deepcopy_copies_all_public_attrs(device):
    for given in all_inputs(device):
        params = [Parameter(torch.randn(2, 3, device=device)) for _ in range(2)]
        for p in params:
            p.grad = torch.rand_like(p)
        opt = SGDSaI(params, **given.kwargs)
        for _ in range(3):
            opt.step()
        twin = deepcopy(opt)
        assert [{name for name in vars(o) if not name.startswith("_")} for o in (opt, twin)] == [{"defaults", "state", "param_groups"}] * 2
        CHECK.assertEqual(twin.state_dict(), opt.state_dict(), rtol=0, atol=0)


@each_device
def test_defaults_changed_to_foreach(device):
    expected = {"cpu": "_fused", "cuda": "_foreach"}[device]
    for given in optim_inputs(device):
        model = torch.nn.Linear(5, 5).to(device)
        opt = SGDSaI(model.parameters(), **given.kwargs)
        model(torch.rand(2, 5, device=device)).sum().backward()
        with patch.object(sgd_sai.optimizer, expected) as mocked:
            opt.step()
        assert mocked.called


@each_device
@pytest.mark.parametrize("flags, expected", [(dict(foreach=True), "_foreach"), (dict(fused=True), "_fused"), (dict(foreach=False), "_for_loop"),
                                             (dict(fused=False), "_for_loop"), (dict(differentiable=True), "_for_loop")])
def test_flags_choose_the_implementation(device, flags, expected):
    p = torch.rand(3, device=device)
    p.grad = torch.randn_like(p)
    with patch.object(sgd_sai.optimizer, expected) as mocked:
        SGDSaI([p], **flags).step()
    assert mocked.called


@each_device
def test_non_empty_state(device):
    for given in all_inputs(device):
        model = torch.nn.Linear(5, 5).to(device)
        opt = SGDSaI(model.parameters(), **given.kwargs)
        model(torch.rand(2, 5, device=device)).sum().backward()
        opt.step()
        for p in model.parameters():
            assert set(opt.state[p]) == ({"gsnr"} if given.kwargs.get("momentum") == 0 else {"gsnr", "momentum_buffer"})


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fused_cpu_matches_cuda(device, dtype):
    for given in optim_inputs("cpu"):
        models = [small_net(dtype, dev) for dev in ("cpu", device)]
        x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
        compare_between([x, x.to(device)], models, [SGDSaI(model.parameters(), **given.kwargs, fused=True) for model in models])


@only_cuda
@pytest.mark.parametrize("foreach", [False, True])
def test_cuda_graph_equals_eager(device, foreach):
    for given in capturable_inputs(device):
        runs = []
        start, grads = torch.randn(4, 3, device=device), torch.randn(6, 4, 3, device=device)
        for captured in (False, True):
            p = Parameter(start.clone())
            p.grad = grads[0].clone()
            opt = SGDSaI([p], **deepcopy(given.kwargs), foreach=foreach)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = torch.cuda.CUDAGraph()
                if captured:
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


def after_step(p, grad, momentum_buffer, gsnr, kwargs, *hyperparameters):
    "Parameter and momentum after one differentiable step, as a function of tensors that gradcheck can vary."
    p = p.clone()
    p.grad = grad
    opt = SGDSaI([p], differentiable=True, **{**kwargs, **dict(zip(("lr", "weight_decay"), hyperparameters))})
    opt.state[p]["gsnr"] = gsnr
    if momentum_buffer is not None:
        opt.state[p]["momentum_buffer"] = momentum_buffer.clone()
    opt.step()
    return (p,) if momentum_buffer is None else (p, opt.state[p]["momentum_buffer"])


def leaf(*shape):
    return torch.rand(shape, dtype=torch.float64, requires_grad=True)


@only_cpu
@pytest.mark.parametrize("kwargs", [dict(lr=0.9), dict(lr=0.9, weight_decay=0.1, maximize=True), dict(lr=0.9, nesterov=True), dict(lr=0.9, momentum=0.0)], ids=str)
def test_differentiable(device, kwargs):
    m = None if kwargs.get("momentum") == 0 else leaf(10)
    assert torch.autograd.gradcheck(after_step, (leaf(10), leaf(10), m, 3.0, kwargs))
    rest = {k: v for k, v in kwargs.items() if k != "lr"}
    assert torch.autograd.gradcheck(after_step, (leaf(10), leaf(10), m, 3.0, rest, leaf(), leaf()))


def meta_loss(p, kwargs, n, lr, weight_decay):
    "Loss after n differentiable steps from a first gradient that starts everything; the scale is a given constant."
    p = p.clone()
    opt = SGDSaI([("p", p)], differentiable=True, lr=lr, weight_decay=weight_decay, **kwargs)
    opt.set_scales({"p": 3.0})
    weights = torch.linspace(0.1, 1, p.numel(), dtype=p.dtype)
    for _ in range(n):
        loss = ((p * weights).sum() - 2) ** 2
        p.grad, = torch.autograd.grad(loss, p, create_graph=True)
        opt.step()
    return ((p * weights).sum() - 2) ** 2


@only_cpu
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kwargs", [dict(), dict(nesterov=True), dict(momentum=0.0), dict(maximize=True)], ids=str)
def test_differentiable_lr_and_weight_decay(device, kwargs, n):
    lr, wd = torch.tensor(0.01, dtype=torch.float64, requires_grad=True), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(meta_loss, (leaf(10), kwargs, n, lr, wd))
    assert torch.autograd.gradcheck(meta_loss, (leaf(10), kwargs, n, 0.01, 0.3))


@only_cpu
def test_differentiable_equals_the_ordinary_step(device):
    for given in optim_inputs(device):
        start, grads = torch.randn(4, 3), torch.randn(5, 4, 3)
        runs = []
        for differentiable in (False, True):
            p = start.clone().requires_grad_()
            p = p.clone() if differentiable else p
            opt = SGDSaI([p], **deepcopy(given.kwargs), differentiable=differentiable)
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
    assert not missing and isinstance(SGDSaI([torch.ones(1)]), Optimizer) and re.match(r"\d+\.\d+", torch.__version__)
