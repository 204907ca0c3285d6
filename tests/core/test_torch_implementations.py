"For-loop, foreach, fused and capturable forms: they agree, are chosen as the flags say, and keep their limits."

import itertools
import sys
import warnings
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from torch.nn import Parameter
from torch_contract import (
    CHECK,
    compare_between,
    contract,
    derived_optimizers,
    each_device,
    each_kind,
    only_cuda,
    small_net,
    snapshot,
    with_foreach,
    with_foreach_or_partly,
)
from torch_kinds import ADAN, SGDSAI, Kind

import sgd_sai.adahessian
import sgd_sai.adan
import sgd_sai.kernels
from sgd_sai.sgd_sai import SGDSaI

pytestmark = contract


@with_foreach_or_partly
@each_device
def test_foreach_matches_forloop(kind, device):
    derived_optimizers(kind, device, torch.float64, "foreach")


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fused_matches_forloop(device, dtype):
    derived_optimizers(SGDSAI, device, dtype, "fused")


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
        p = Parameter(torch.ones(3 * sgd_sai.kernels.CACHE_CHUNK + 5))
        p.grad = torch.randn_like(p)
        with patch.object(torch, "_fused_sgd_", lambda ps, *a, **k: (sizes.append(ps[0].numel()), real(ps, *a, **k))):
            SGDSaI([p], fused=True).step()
        assert (
            sum(sizes) == 2 * p.numel() and max(sizes) <= sgd_sai.kernels.CACHE_CHUNK < 2**31
        )  # once for the average, once for the step
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
            opt, scaler = (
                kind.cls(model.parameters(), **deepcopy(given.kwargs), **flags),
                torch.amp.GradScaler(device, init_scale=128.0, enabled=scaled),
            )
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


def function_called(kind, name, p, **kwargs):
    "Whether a step of the parameter p calls this function of the optimizer's module."
    kind.give(p, torch.randn_like(p))
    opt = kind.cls([p], **kwargs)
    home = kind.module if hasattr(kind.module, name) else sys.modules[kind.cls.__module__]
    with patch.object(home, name) as mocked:
        opt.step()
    return mocked.called


@with_foreach
@each_device
def test_defaults_changed_to_foreach(kind, device):
    large = {"cuda": "_foreach", "cpu": "_fused" if kind is SGDSAI else "_for_loop"}[device]
    for given in kind.optim_inputs(device):
        if not given.kwargs.get("restart_radius"):  # which needs to look at one parameter after the other
            assert function_called(kind, large, Parameter(torch.rand(5, 5, device=device)), **given.kwargs)
            assert kind is SGDSAI or function_called(
                kind, "_foreach", Parameter(torch.rand(2, 2, device=device)), **given.kwargs
            )


@pytest.mark.parametrize(
    "kind, flags, expected",
    [
        (SGDSAI, dict(foreach=True), "_foreach"),
        (SGDSAI, dict(fused=True), "_fused"),
        (SGDSAI, dict(foreach=False), "_for_loop"),
        (SGDSAI, dict(fused=False), "_for_loop"),
        (SGDSAI, dict(differentiable=True), "_for_loop"),
        (ADAN, dict(foreach=True), "_foreach"),
        (ADAN, dict(foreach=False), "_for_loop"),
        (ADAN, dict(differentiable=True), "_step_differentiable"),
        (ADAN, dict(foreach=True, restart_radius=1.0), "_for_loop"),
    ],
    ids=lambda x: x.cls.__name__ if isinstance(x, Kind) else str(x),
)
@each_device
def test_flags_choose_the_implementation(kind, device, flags, expected):
    for n in (3, 30):
        p = torch.rand(n, device=device)
        assert function_called(kind, expected, p, **flags)


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fused_cpu_matches_cuda(device, dtype):
    for given in SGDSAI.optim_inputs("cpu"):
        models = [small_net(dtype, dev) for dev in ("cpu", device)]
        x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
        compare_between(
            [x, x.to(device)], models, [SGDSaI(model.parameters(), **given.kwargs, fused=True) for model in models]
        )


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
