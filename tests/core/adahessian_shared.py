"""What the tests of AdaHessian share: the arithmetic of the released code (amirgholami/adahessian), coming signs and
products with the Hessian, averages in plain Python, a small model, and what an error must leave unchanged.

"Equal to 1e-6" means, tensor by tensor, max|p - q| <= 1e-6 max|q|, where q is computed in float64 from the same float32
gradients and products with the Hessian: in float32 the released code's own rounding over twenty steps is of that size.
The products are made with the signs that the optimizer itself is about to draw."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from sgd_sai.hutchinson import signs_by_group


class Released(Optimizer):
    """What the released class computes and keeps, written anew from its arithmetic.

    That is the absolute product with random signs, averaged over the window of a 4-D tensor and no other, in a second
    average of the parameter's shape; and the number of steps as an int."""

    def __init__(self, params, lr=0.15, betas=(0.9, 0.999), eps=1e-4, weight_decay=0, hessian_power=1):
        super().__init__(
            params, {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        )

    @torch.no_grad()
    def step(self, products):
        params = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(products.get(p) is None for _, p in params):
            raise RuntimeError("a gradient does not have a grad_fn")
        for group, p in params:
            state, k, (b1, b2) = self.state[p], group["hessian_power"], group["betas"]
            D = {0: torch.abs, 1: torch.abs, 2: torch.abs, 4: lambda Hz: Hz.abs().mean([2, 3], keepdim=True)}[p.ndim](
                products[p]
            )
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_hessian_diag_sq=torch.zeros_like(p))
            state["step"] = t = state["step"] + 1
            state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * p.grad
            state["exp_hessian_diag_sq"] = b2 * state["exp_hessian_diag_sq"] + (1 - b2) * D.square().expand_as(p)
            denominator = state["exp_hessian_diag_sq"].sqrt() ** k / ((1 - b2**t) ** 0.5) ** k + group["eps"]
            p.data = p.data - group["lr"] * (
                state["exp_avg"] / (1 - b1**t) / denominator + group["weight_decay"] * p.data
            )


def coming_signs(opt, n_samples=1):
    "The signs that the next step of `opt` will draw for the gradients it has now: one dict for each sample."
    draw = signs_by_group(opt, [i for i, group in enumerate(opt.param_groups) if group["age"] == 0])
    curved = [
        p
        for group in opt.param_groups
        if group["age"] == 0
        for p in group["params"]
        if p.grad is not None and p.grad.requires_grad
    ]
    return [{p: draw(p) for p in curved} for _ in range(n_samples)]


def products(z):
    "Parameter -> product of the Hessian with the signs `z`; the graph stays."
    return dict(
        zip(z, torch.autograd.grad([p.grad for p in z], list(z), list(z.values()), retain_graph=True), strict=True)
    )


def plain_blocks(D, size):
    "Means of consecutive entries, in plain Python."
    flat = D.flatten().tolist()
    out = []
    for i in range(0, len(flat), size):
        block = flat[i : i + size]
        out += [sum(block) / len(block)] * len(block)
    return torch.tensor(out, dtype=torch.float64).view(D.shape)


def plain_windows(D):
    "Means over all dimensions but the first two, in plain Python."
    out = [
        [sum(window := D[i, j].flatten().tolist()) / len(window) for j in range(D.shape[1])] for i in range(D.shape[0])
    ]
    return torch.tensor(out, dtype=torch.float64).view(*D.shape[:2], *[1] * (D.ndim - 2))


def plain_average(D, block_size=1, average_window=True, signed_average=False):
    D = D if signed_average else D.abs()
    if D.ndim > 2:
        return (plain_windows(D) if average_window else D).abs()
    return (plain_blocks(D, block_size) if D.ndim == 2 else D).abs()


SHAPES = [(), (7,), (6, 5), (4, 3, 5), (4, 3, 3, 3), (2, 2, 3, 2, 3)]


def uneven(params):
    "A loss with a full Hessian."
    flat = torch.cat([p.flatten() for p in params])
    return (flat**4 / 4 + flat**2).sum() + flat.sum() ** 2 / 10 + (flat * flat.roll(1)).sum()


def small_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 2))


def small_data(n=8):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64), torch.randn(
        n, 2, generator=generator, dtype=torch.float64
    )


def assert_same_run(mine, theirs, **tolerance):
    for p, q in zip(mine[0], theirs[0], strict=True):
        torch.testing.assert_close(p, q, **tolerance)
    for s, t in zip(mine[1], theirs[1], strict=True):
        assert s.keys() == t.keys()
        for key in t:
            torch.testing.assert_close(s[key], t[key], **tolerance)


def one_step(net, opt, x, y, outcome):
    "One step, or one that fails or is skipped."
    opt.zero_grad()
    if outcome == "skipped by a GradScaler":
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(F.mse_loss(net(x), y) * torch.inf).backward(create_graph=True)
        scaler.step(opt)
        return
    if outcome == "not finite":
        (F.mse_loss(net(x), y) + net[0].bias.sub(net[0].bias.detach()).pow(1.5).sum()).backward(create_graph=True)
        with contextlib.suppress(FloatingPointError):
            opt.step()
            raise AssertionError("an error was expected")
        return
    F.mse_loss(net(x), y).backward(create_graph=True)
    opt.step()


def everything(opt, params):
    "What a step that fails must not change."
    return copy.deepcopy(
        (
            [p.detach() for p in params],
            [None if p.grad is None else p.grad.detach() for p in params],
            [dict(opt.state.get(p, {})) for p in params],
            [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups],
        )
    )


def same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor) and a.layout == torch.strided:
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    return torch.equal(a.to_dense(), b.to_dense()) if isinstance(a, torch.Tensor) else a == b


def assert_refused(opt, params, error, match, step=None):
    "The step raises this error, changes nothing, and leaves no graph behind."
    before = everything(opt, params)
    with pytest.raises(error, match=match):
        (step or opt.step)()
    assert same(everything(opt, params), before)
    assert not any(p.grad is not None and p.grad.requires_grad for p in params)
