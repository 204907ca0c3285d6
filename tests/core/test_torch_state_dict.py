"`state_dict`, `load_state_dict` and copies: what is saved, what older and other forms are accepted, what a copy keeps."

import inspect
import tempfile
from copy import deepcopy

import pytest
import torch
from torch.nn import Parameter
from torch_contract import CHECK, contract, each_device, each_kind, evaluate, only_cuda, problem, with_number

from sgd_sai.sgd_sai import SGDSaI

pytestmark = contract


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
        assert all(
            v.device.type == "cuda"
            for key, v in other.state[q].items()
            if isinstance(v, torch.Tensor) and (impl == "capturable" or v.ndim)
        )


def named(params, do):
    return [(f"name{i}", p) for i, p in enumerate(params)] if do else params


def without_names(state_dict):
    return {
        **state_dict,
        "param_groups": [
            {k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]
        ],
    }


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
        CHECK.assertEqual(
            without_names(opt.state_dict())["param_groups"][-1], without_names(other.state_dict())["param_groups"][-1]
        )


def conv_net(kind, device):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2)).to(device)
    x = torch.rand(1, 4, 16, 16, device=device)

    def closure():
        model.zero_grad()
        loss = (model(x) ** 2).sum()
        kind.backward(loss)
        return loss

    return model, closure


@each_kind
@each_device
def test_can_load_older_state_dict(kind, device):
    assert "maximize" in kind.own_flags and set(kind.supports) - {"foreach"} <= set(kind.own_flags) <= set(
        kind.cls([torch.ones(1)]).defaults
    )
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
            assert opt.param_groups[0][flag] == given.kwargs.get(
                flag, inspect.signature(kind.cls).parameters[flag].default
            )
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
            names = [name for group in other.state_dict()["param_groups"] for name in group["param_names"]]
            assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


@each_kind
@each_device
@pytest.mark.parametrize("is_named_optim", [True, False])
def test_save_load_equality_with_weights_only(kind, device, is_named_optim):
    for given in kind.all_inputs(device):
        weight, bias, closure = problem(kind, device)
        opt = kind.cls(
            named([weight, bias], is_named_optim),
            **given.kwargs,
            **(dict(state_dtype=torch.float64) if kind.state_dtype and not given.kwargs.get("fused") else {}),
        )
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

    for mine, theirs, result in (
        (twice, "gsnr", "gsnr"),
        (twice, twice, twice),
        ("gsnr", twice, "gsnr"),
        ("sqrt_numel", "gsnr", "sqrt_numel"),
    ):
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
    assert opts[1].scales() == {"p": 50.0} and torch.equal(
        opts[1].state[q]["momentum_buffer"], opts[0].state[p]["momentum_buffer"]
    )


def step_randomly(kind, opt, params):
    for p in params:
        kind.give(p, torch.rand_like(p))
    opt.step()


def step_along(kind, opt, params, grads):
    for p, g in zip(params, grads, strict=True):
        kind.give(p, g.to(p.device))
    opt.step()


@with_number
@each_device
def test_load_nontensor_step(kind, device):
    for given in kind.all_inputs(device):
        params = [Parameter(torch.randn(6, device=device)) for _ in range(2)]
        opt = kind.cls(params, **given.kwargs)
        for _ in range(3):
            step_randomly(kind, opt, params)
        for t, convert in enumerate(
            (lambda n: float(n), lambda n: torch.tensor(float(n)), lambda n: torch.tensor([float(n)])[0].to(device)), 4
        ):
            numbers = [float(opt.state[p][kind.number]) for p in params]
            saved = deepcopy(opt.state_dict())
            for state in saved["state"].values():
                state[kind.number] = convert(state[kind.number])
            opt.load_state_dict(saved)
            step_randomly(kind, opt, params)
            now = [float(opt.state[p][kind.number]) for p in params]
            assert (
                now == pytest.approx(numbers, rel=0 if isinstance(state["gsnr"], float) else 1e-7)
                if kind.number == "gsnr"
                else now == [t, t]
            )
            expected = float if kind.number == "gsnr" and not given.kwargs.get("capturable") else torch.Tensor
            assert all(isinstance(opt.state[p][kind.number], expected) for p in params)


@each_kind
@only_cuda
def test_state_dict_with_cuda_params(kind, device):
    for given in kind.all_inputs("cpu"):
        params, grads = [Parameter(torch.randn(2, 3)) for _ in range(2)], [torch.randn(2, 3) for _ in range(2)]
        opt = kind.cls(params, **given.kwargs)
        for _ in range(3):
            step_along(kind, opt, params, grads)
        cuda = [Parameter(p.detach().to(device)) for p in params]
        other = kind.cls(cuda, **given.kwargs)
        saved, kept = deepcopy(opt.state_dict()), deepcopy(opt.state_dict())
        other.load_state_dict(saved)
        CHECK.assertEqual(saved, kept)
        for q in cuda:
            assert all(
                v.device == q.device
                for v in other.state[q].values()
                if isinstance(v, torch.Tensor) and (v.ndim or given.kwargs.get("capturable"))
            )
        for _ in range(5):
            step_along(kind, opt, params, grads), step_along(kind, other, cuda, grads)
            CHECK.assertEqual(params, cuda, exact_device=False)
            CHECK.assertEqual(opt.state_dict(), other.state_dict(), exact_device=False)


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
        assert [{name for name in vars(o) if not name.startswith("_")} for o in (opt, twin)] == [
            {"defaults", "state", "param_groups"} | kind.attributes
        ] * 2
        CHECK.assertEqual(twin.state_dict(), opt.state_dict(), rtol=0, atol=0)
