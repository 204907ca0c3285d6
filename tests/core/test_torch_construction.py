"How an optimizer is built, and what is refused: defaults, parameter groups, errors, its text form."

from functools import partial

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
)
from torch_contract import CHECK, assert_right_direction, contract, each_device, each_kind, only_cpu, problem
from torch_kinds import ADAN

pytestmark = contract


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
        expect = partial(
            pytest.warns if issubclass(case.error_type, Warning) else pytest.raises,
            case.error_type,
            match=case.error_regex,
        )
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
def test_param_groups_weight_decay(kind, device):
    for given in kind.all_inputs(device):
        weight, bias, closure = problem(kind, device)
        opt = kind.cls(
            [
                dict(params=[weight], **kind.slowly(given.kwargs)),
                dict(params=[bias], **{**kind.slowly(given.kwargs), "weight_decay": 0.0}),
            ]
        )
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
        opt = kind.cls(
            [
                dict(params=params[:1], **{**kwargs, "weight_decay": 0.5}),
                dict(params=params[1:], **{**kwargs, "weight_decay": 0.0}),
            ]
        )
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
def test_optimizer_can_be_printed(kind, device):
    for given in kind.all_inputs(device, skip=()):
        text = repr(kind.cls([Parameter(torch.randn(2, 3, device=device)) for _ in range(2)], **given.kwargs))
        assert text.startswith(f"{kind.cls.__name__} (") and all(name in text for name in kind.own_flags)
