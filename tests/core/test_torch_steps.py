"What a step does: the loss goes down, with schedulers and a tensor lr too; without a gradient nothing happens."

import itertools

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch_contract import CHECK, TWO_GPUS, assert_right_direction, contract, each_device, each_kind, evaluate, problem

pytestmark = contract


def step_schedulers(schedulers, loss):
    for scheduler in schedulers:
        scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


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
        for _ in range(4):
            evaluate(kind, weight, bias, x), evaluate(kind, *twins, x)
            opts[0].step(), opts[1].step()
            step_schedulers(schedulers, None)
            if not with_lrsched:
                for group in opts[0].param_groups:
                    group["lr"] *= 0.5
                lr.mul_(0.5)
            CHECK.assertEqual([weight, bias], twins)
        assert opts[1].param_groups[0]["lr"] is lr and lr.item() == pytest.approx(1e-3 / 16)


@each_kind
@each_device
def test_step_is_noop_when_params_have_no_grad(kind, device):
    for given in kind.all_inputs(device, skip=()):
        params = [torch.randn(2, 3, device=device) for _ in range(2)]
        before = [p.clone() for p in params]
        opt = kind.cls(params, **given.kwargs)
        assert opt.step(lambda: torch.tensor([1], device=device)).item() == 1
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and not any(opt.state.values())


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
def test_non_empty_state(kind, device):
    for given in kind.all_inputs(device):
        model = torch.nn.Linear(5, 5).to(device)
        opt = kind.cls(model.parameters(), **given.kwargs)
        kind.backward(model(torch.rand(2, 5, device=device)).square().sum())
        opt.step()
        for p in model.parameters():
            assert set(opt.state[p]) == kind.states(given.kwargs, p.ndim)
