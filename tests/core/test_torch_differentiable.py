"Steps that autograd runs through, as in PyTorch's tests of differentiable optimizers."

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch_contract import CHECK, contract, only_cpu, with_foreach
from torch_kinds import ADAN, SGDSAI, Kind

pytestmark = contract


def after_step(kind, p, grad, number, states, kwargs, *hyperparameters):
    "Parameter and state after one differentiable step, as a function of tensors that gradcheck can vary."
    p = p.clone()
    p.grad = grad
    opt = kind.cls(
        [p], differentiable=True, **{**kwargs, **dict(zip(("lr", "weight_decay"), hyperparameters, strict=False))}
    )
    opt.state[p].update(
        {
            kind.number: number if isinstance(number, float) else number.clone(),
            **{key: value.clone() for key, value in states.items()},
        }
    )
    opt.step()
    return (p, *(opt.state[p][key] for key in states))


def leaf(*shape):
    return torch.rand(shape, dtype=torch.float64, requires_grad=True)


DIFFERENTIABLE = [
    (SGDSAI, dict(lr=0.9)),
    (SGDSAI, dict(lr=0.9, weight_decay=0.1, maximize=True)),
    (SGDSAI, dict(lr=0.9, nesterov=True)),
    (SGDSAI, dict(lr=0.9, momentum=0.0)),
    (ADAN, dict(lr=0.9)),
    (ADAN, dict(lr=0.9, weight_decay=0.1, maximize=True)),
    (ADAN, dict(lr=0.9, weight_decay=0.1, no_prox=True)),
    (ADAN, dict(lr=0.9, betas=(0.5, 0.0, 0.9), eps=0.1)),
]


@pytest.mark.parametrize(
    "kind, kwargs", DIFFERENTIABLE, ids=lambda x: x.cls.__name__ if isinstance(x, Kind) else str(x)
)
@only_cpu
def test_differentiable(kind, device, kwargs):
    keys = [key for key in kind.states(kwargs, 1) if key != kind.number]
    number = 3.0 if kind is SGDSAI else torch.tensor(3.0)

    def f(p, grad, *rest):
        return after_step(
            kind,
            p,
            grad,
            number,
            dict(zip(keys, rest, strict=False)),
            {k: v for k, v in kwargs.items() if k != "lr" or len(rest) == len(keys)},
            *rest[len(keys) :],
        )

    assert torch.autograd.gradcheck(f, (leaf(10), leaf(10), *(leaf(10) for _ in keys)))
    assert torch.autograd.gradcheck(
        f, (leaf(10), leaf(10), *(leaf(10) for _ in keys), leaf(), leaf())
    )  # with lr and weight_decay


def meta_loss(kind, p, kwargs, n, lr, weight_decay):
    "Loss after n differentiable steps from a first gradient that starts everything; a scale is a given constant."
    p = p.clone()
    opt = kind.cls([("p", p)], differentiable=True, lr=lr, weight_decay=weight_decay, **kwargs)
    if kind is SGDSAI:
        opt.set_scales({"p": 3.0})
    weights = torch.linspace(0.1, 1, p.numel(), dtype=p.dtype)
    for _ in range(n):
        loss = ((p * weights).sum() - 7) ** 2
        (p.grad,) = torch.autograd.grad(loss, p, create_graph=True)
        opt.step()
    return ((p * weights).sum() - 7) ** 2


META = [
    (SGDSAI, dict()),
    (SGDSAI, dict(nesterov=True)),
    (SGDSAI, dict(momentum=0.0)),
    (SGDSAI, dict(maximize=True)),
    (ADAN, dict()),
    (ADAN, dict(no_prox=True)),
    (ADAN, dict(maximize=True, betas=(0.5, 0.5, 0.5))),
]


@only_cpu
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("kind, kwargs", META, ids=lambda x: x.cls.__name__ if isinstance(x, Kind) else str(x))
def test_differentiable_lr_and_weight_decay(kind, device, kwargs, n):
    lr, wd = (
        torch.tensor(0.01, dtype=torch.float64, requires_grad=True),
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
    )
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
