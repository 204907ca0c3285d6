"""The arithmetic of the released code of Adan (sail-sg/Adan), and the implementations that are held against it.

"Equal to 1e-6" means, tensor by tensor, max|p - q| <= 1e-6 max|q|, where q is computed in float64 from the same float32
gradients: in float32 the released code's own rounding over twenty steps is of that size."""

import math

import pytest
import torch
import torch._dynamo.testing
from torch.optim import Optimizer

IMPLEMENTATIONS = {
    "forloop": dict(foreach=False),
    "foreach": dict(foreach=True),
    "default": {},
    "capturable": dict(capturable=True),
    "capturable forloop": dict(capturable=True, foreach=False),
}


each_implementation = pytest.mark.parametrize("flags", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


class Released(Optimizer):
    """What the released class computes and keeps, written anew from its arithmetic.

    It has one step count for a group and bias corrections from that, keeps the last gradient with its sign changed, and
    scales gradients in place to the `max_grad_norm` of the constructor."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.98, 0.92, 0.99),
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=0.0,
        no_prox=False,
        foreach=True,
        fused=False,
    ):
        super().__init__(
            params, {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        )

    @torch.no_grad()
    def step(self):
        factor = 1.0
        params = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.defaults["max_grad_norm"]:
            norm = math.sqrt(sum(p.grad.square().sum().item() for _, p in params))
            factor = min(1.0, self.defaults["max_grad_norm"] / (norm + self.param_groups[-1]["eps"]))
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        for group, p in params:
            g, state, t, lr, (b1, b2, b3) = p.grad, self.state[p], group["step"], group["lr"], group["betas"]
            g.mul_(factor)
            if not state:
                state.update({key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq", "exp_avg_diff")})
            if t == 1 or "neg_pre_grad" not in state:
                state["neg_pre_grad"] = -g
            change = g + state["neg_pre_grad"]
            state["exp_avg"] = state["exp_avg"] * b1 + g * (1 - b1)
            state["exp_avg_diff"] = state["exp_avg_diff"] * b2 + change * (1 - b2)
            state["exp_avg_sq"] = state["exp_avg_sq"] * b3 + (g + b2 * change).square() * (1 - b3)
            state["neg_pre_grad"] = -g
            denominator = state["exp_avg_sq"].sqrt() / math.sqrt(1 - b3**t) + group["eps"]
            if group["no_prox"]:
                p *= 1 - lr * group["weight_decay"]
            p -= (
                lr / (1 - b1**t) * state["exp_avg"] / denominator
                + lr * b2 / (1 - b2**t) * state["exp_avg_diff"] / denominator
            )
            if not group["no_prox"]:
                p /= 1 + lr * group["weight_decay"]

    @torch.no_grad()
    def restart_opt(self):
        for group in self.param_groups:
            group["step"] = 0
            for p in group["params"]:
                self.state[p].update({key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq", "exp_avg_diff")})
