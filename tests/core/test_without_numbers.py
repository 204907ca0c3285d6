"""Tensors on the meta device and those of FakeTensorMode have a shape and no entries: nothing can be measured on them.

The first step says so, names the parameters, and says what to do; with `set_scales` all steps of SGDSaI work.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI
from sgd_sai.internals import rounding
from sgd_sai.internals.sharding import holds_numbers

BF16, INT8 = torch.bfloat16, torch.int8
SETTINGS = {
    "default": {},
    "foreach": dict(foreach=True),
    "forloop": dict(foreach=False, fused=False),
    "capturable": dict(capturable=True),
    "normalize": dict(normalize=True),
    "normalize, capturable": dict(normalize=True, capturable=True),
    "nesterov": dict(nesterov=True),
    "no momentum": dict(momentum=0.0),
    "no decay": dict(weight_decay=0.0),
    "bfloat16 state": dict(state_dtype=BF16),
    "bfloat16 state, stochastic": dict(state_dtype=BF16, rounding="stochastic"),
    "int8 state": dict(state_dtype=INT8),
    "kahan": dict(rounding="kahan"),
    "own rule": dict(scale=lambda grad: grad.abs().max()),
    "sqrt_numel": dict(scale="sqrt_numel"),
}
KINDS = {"meta": (nullcontext, "meta"), "fake": (FakeTensorMode, "cpu")}
each_kind = pytest.mark.parametrize("mode, device", KINDS.values(), ids=KINDS)


def network(device, dtype):
    net = nn.Sequential(nn.Linear(6, 300, device=device, dtype=dtype), nn.Linear(300, 3, device=device, dtype=dtype))
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    return net


def by_size(net):
    return {name: p.numel() ** 0.5 for name, p in net.named_parameters()}


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tensors_without_numbers_need_scales_that_are_set(mode, device, dtype, settings, monkeypatch):
    monkeypatch.setattr(rounding, "_tables", {})
    with mode():
        net = network(device, dtype)
        opt = SGDSaI(net.named_parameters(), **settings)
        with pytest.raises(RuntimeError, match="0.weight, 0.bias, 1.weight, 1.bias: .*optimizer.set_scales"):
            opt.step()
        assert not opt.state and opt.scales() == {}
        scales = by_size(net)
        opt.set_scales(scales)
        for _ in range(2):
            opt.step()
        for p in net.parameters():
            assert not holds_numbers(p)
            if opt.defaults["momentum"]:
                m = opt.state[p]["momentum_buffer"]
                assert m.shape == p.shape and m.device == p.device and not holds_numbers(m)
                assert m.dtype == (settings.get("state_dtype") or dtype)
        if not settings.get("capturable"):
            assert opt.scales() == pytest.approx(scales)


@each_kind
def test_only_the_parameters_without_a_scale_are_named(mode, device):
    with mode():
        net = network(device, torch.float32)
        opt = SGDSaI(net.named_parameters())
        opt.set_scales({name: 1.0 for name, _ in net.named_parameters() if name != "1.weight"})
        with pytest.raises(RuntimeError, match="^1.weight: "):
            opt.step()
        assert all("momentum_buffer" not in state for state in opt.state.values())


@each_kind
def test_muon_sai_asks_for_the_scales_of_the_rest(mode, device):
    with mode():
        net = network(device, torch.float32)
        rest = [(name, p) for name, p in net.named_parameters() if name != "1.weight"]
        opt = MuonSaI([{"params": [("1.weight", net[1].weight)], "muon": True}, {"params": rest}], rest="sgd_sai")
        with pytest.raises(RuntimeError, match="0.weight, 0.bias, 1.bias: .*set_scales"):
            opt.step()
        assert not opt.state
        opt.set_scales({name: G for name, G in by_size(net).items() if name != "1.weight"})
        for _ in range(2):
            opt.step()
        assert all(opt.state[p]["momentum_buffer"].shape == p.shape for p in net.parameters())


@each_kind
@pytest.mark.parametrize("settings", [{}, dict(state_dtype=BF16), dict(state_dtype=INT8)], ids=str)
@pytest.mark.parametrize("rest", ["sign", "row_norm", "adams", "scion"])
def test_other_rules_of_the_rest_need_no_scales(mode, device, rest, settings, monkeypatch):
    monkeypatch.setattr(rounding, "_tables", {})
    with mode():
        net = network(device, torch.float32)
        others = [(name, p) for name, p in net.named_parameters() if name != "1.weight"]
        groups = [{"params": [("1.weight", net[1].weight)], "muon": True}, {"params": others}]
        opt = MuonSaI(groups, rest=rest, **settings)
        for _ in range(2):
            opt.step()
        momenta = [opt.state[p]["momentum_buffer"] for p in net.parameters()]
        assert {m.dtype for m in momenta} == {settings.get("state_dtype", torch.float32)}
        assert [m.shape for m in momenta] == [p.shape for p in net.parameters()]


@each_kind
@pytest.mark.parametrize("settings", [{}, dict(foreach=False), dict(capturable=True), dict(state_dtype=BF16)], ids=str)
def test_adan_needs_numbers_for_its_restarts_alone(mode, device, settings, monkeypatch):
    monkeypatch.setattr(rounding, "_tables", {})
    with mode():
        net = network(device, torch.float32)
        opt = Adan(net.named_parameters(), restart_radius=1.0, **settings)
        with pytest.raises(RuntimeError, match="0.weight, 0.bias, 1.weight, 1.bias: .*leave restart_radius out"):
            opt.step()
        assert not opt.state
        opt = Adan(net.named_parameters(), **settings)
        for _ in range(2):
            opt.step()
        assert all(opt.state[p]["exp_avg"].shape == p.shape for p in net.parameters())


@each_kind
def test_adahessian_needs_numbers_for_its_curvature(mode, device):
    with mode():
        net = network(device, torch.float32)
        opt = AdaHessian(net.named_parameters())
        with pytest.raises(RuntimeError, match="0.weight, 0.bias, 1.weight, 1.bias: .*a curvature could be estimated"):
            opt.step()
        assert not opt.state


def test_fused_needs_a_device_that_has_such_a_kernel():
    net = network("meta", torch.float32)
    opt = SGDSaI(net.named_parameters(), fused=True)
    opt.set_scales(by_size(net))
    before = {p: dict(opt.state[p]) for p in net.parameters()}
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be .* supported devices$"):
        opt.step()
    assert {p: dict(opt.state[p]) for p in net.parameters()} == before
