"An optimizer that steps all of its parameters by one of the rules for the rest, and runs of it beside the reference."

import torch

from sgd_sai.init_scales import collect_grads
from sgd_sai.internals.base import BaseOptimizer
from sgd_sai.rest_kernels import check_rest_entries, step_rest
from sgd_sai.rest_rules import check_rest, rest_reference
from sgd_sai.scaled_optimizer import ScaledOptimizer

UNUSED = dict(lr_factor=1.0, fused=None, differentiable=False, capturable=False, state_dtype=None, rounding=None)
USED = dict(rest="sign", momentum=0.95, nesterov=False, weight_decay=0.1, eps=1e-8, maximize=False, foreach=None)
RULES = [("sign", False), ("sign", True), ("row_norm", False), ("row_norm", True), ("adams", False)]  # and nesterov


class RestOptimizer(BaseOptimizer):
    eight_bit_state, state_shapes = ScaledOptimizer.eight_bit_state, ScaledOptimizer.state_shapes

    def __init__(self, params, lr=0.02, **changes):
        layout = dict(stacked=False, transposed=False)
        super().__init__(params, dict(lr=lr) | UNUSED | USED | layout | changes)

    def check(self, group):
        check_rest(group)

    def step(self):
        groups = collect_grads(self)
        check_rest_entries(self, groups)
        step_rest(self, groups)


def with_absent_rows(t):
    "`t` with about a third of its slices along the first two dimensions zeroed."
    for d in range(min(t.ndim, 2)):
        shape = [n if i == d else 1 for i, n in enumerate(t.shape)]
        t = t * (torch.rand(shape) > 0.2)
    return t


def reference_steps(thetas, grads, lr=0.02, dtype=None, **settings):
    "The parameters after the steps of `grads`, a list for each step; computed in `dtype`, stored as they are given."
    settings = dict(rest="sign", momentum=0.95, weight_decay=0.1) | settings
    settings["mu"] = settings.pop("momentum")
    states = [{} for _ in thetas]
    for gs in grads:
        new = []
        for theta, g, state in zip(thetas, gs, states, strict=True):
            wide = dtype or theta.dtype
            state.update({key: m.to(wide) for key, m in state.items()})
            stepped = rest_reference(theta=theta.to(wide), g=g.to(wide), state=state, lr=lr, **settings)
            state.update({key: m.to(theta.dtype) for key, m in state.items()})
            new.append(stepped.to(theta.dtype))
        thetas = new
    return thetas, [state["momentum_buffer"] for state in states]
