"The four defects of the released code of Adan that must not be inherited, one test each or more."

import copy

import pytest
import torch
import torch._dynamo.testing
from adan_released import Released, each_implementation
from common import (
    each_travel,
    noise,
    param,
    steps,
    twin,
)
from torch.nn.utils import clip_grad_norm_

from sgd_sai.adan import Adan, adan_reference

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")


@each_implementation
def test_defect_clipping_overwrites_the_gradient(flags):
    params, grads = [param(4, 3), param(7), param(2, 3, 2, 2)], []
    grads = [[g * 10 for g in noise(p, 4)] for p in params]

    theirs = [twin(p) for p in params]
    for p, gs in zip(theirs, grads, strict=True):
        p.grad = gs[0].clone()
    Released(theirs, max_grad_norm=1.0).step()
    assert all(
        (p.grad.norm() < 0.9 * gs[0].norm()) for p, gs in zip(theirs, grads, strict=True)
    )  # what was measured there afterwards, was of other gradients

    ours, exact = [twin(p) for p in params], [twin(p.double()) for p in params]
    opt, reference = Adan(ours, weight_decay=0.1, **flags), Released(exact, weight_decay=0.1)
    for t, clip in enumerate((False, True, True, False)):
        for p, gs in zip(ours, grads, strict=True):
            p.grad = gs[t].clone()
        if clip:
            clip_grad_norm_(ours, 1.0)
            assert sum(p.grad.square().sum() for p in ours) < 1.0001
        kept = [(p.grad, p.grad.clone(), p.grad._version) for p in ours]
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.double()
        opt.step(), reference.step()
        for p, q, (grad, value, version) in zip(ours, exact, kept, strict=True):
            assert p.grad is grad and grad._version == version and torch.equal(grad, value)
            assert (p - q).abs().max() <= 1e-6 * q.abs().max()


def test_defect_per_group_max_grad_norm_is_ignored():
    params = [param(4, 3), param(7)]
    grads = [10 * torch.randn_like(p) for p in params]

    theirs = [twin(p) for p in params]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = g.clone()
    Released([{"params": theirs[:1], "max_grad_norm": 0.5}, {"params": theirs[1:], "max_grad_norm": 2.0}]).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(theirs, grads, strict=True))  # no word of it

    with pytest.raises(TypeError, match="max_grad_norm"):
        Adan(params, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="max_grad_norm.*clip_grad_norm_"):
        Adan([{"params": params, "max_grad_norm": 0.5}])
    ours, given = [twin(p) for p in params], [twin(p) for p in params]
    opt, other = (Adan([{"params": ps[:1]}, {"params": ps[1:]}]) for ps in (ours, given))
    for p, q, g, group, norm in zip(
        ours, given, grads, opt.param_groups, (0.5, 2.0), strict=True
    ):  # what takes its place, each group with its own norm
        p.grad, q.grad = g.clone(), g * norm / g.norm()
        clip_grad_norm_(group["params"], norm)
    opt.step(), other.step()
    for p, q in zip(ours, given, strict=True):
        torch.testing.assert_close(opt.state[p]["exp_avg"], other.state[q]["exp_avg"], rtol=1e-5, atol=1e-8)


@each_implementation
def test_defect_one_step_count_for_a_group_leaves_late_parameters_without_bias_correction(flags):
    early, late, added = param(4, 3), param(5), param(2, 2)
    lr, grads = 0.01, {id(p): noise(p, 305) for p in (early, late, added)}

    theirs = [twin(early), twin(late)]
    opt = Released(theirs, lr=lr)
    for t in range(301):
        steps(opt, theirs, [grads[id(early)][t], grads[id(late)][t] if t == 300 else None])
    # debiased as if it had been averaging for 301 steps: (1 - b1)/sqrt(1 - b3) = 0.2 of what everybody's first step is
    torch.testing.assert_close((theirs[1] - late).detach(), -lr * 0.2 * grads[id(late)][300].sign(), rtol=0.05, atol=0)

    ours = [twin(early), twin(late), twin(added)]
    opt = Adan(ours[:2], lr=lr, **flags)
    for t in range(305):
        if t == 302:
            opt.add_param_group({"params": [ours[2]], "lr": 0.1})
        steps(
            opt,
            ours,
            [grads[id(early)][t], grads[id(late)][t] if t >= 300 else None, grads[id(added)][t] if t >= 302 else None],
        )
        if t == 300:
            torch.testing.assert_close((ours[1] - late).detach(), -lr * grads[id(late)][300].sign(), rtol=1e-4, atol=0)
    for p, mine, start, rate in zip((early, late, added), ours, (0, 300, 302), (lr, lr, 0.1), strict=True):
        alone = twin(p)
        other = Adan([alone], lr=rate, **flags)
        steps(other, [alone], *([g] for g in grads[id(p)][start:]))
        assert torch.equal(mine, alone) and opt.state[mine]["step"] == 305 - start


def skipping(p, n=6, skipped=(2, 3)):
    "Gradients of n steps, none in the steps `skipped`, after which they are of another size."
    return [
        None if t in skipped else (100.0 if t > max(skipped) else 1.0) * torch.randn_like(p).abs() for t in range(n)
    ]


@each_implementation
def test_defect_skipped_parameter_keeps_a_stale_gradient(flags):
    p, other = param(4, 3), param(5)
    grads, others = skipping(p), noise(other, 6)

    theirs = [twin(p), twin(other)]
    opt = Released(theirs)
    steps(opt, theirs, *zip(grads[:5], others[:5], strict=True))
    stale = (1 - 0.92) * (grads[4] - grads[1])
    assert (
        opt.state[theirs[0]]["exp_avg_diff"] - stale
    ).norm() < 0.05 * stale.norm()  # a difference across three steps

    ours, exact = [twin(p), twin(other)], [p.detach().double(), other.detach().double()]
    opt, states = Adan(ours, **flags), [{}, {}]
    for t in range(6):
        before = ours[0].detach().clone(), copy.deepcopy(opt.state.get(ours[0], {}))
        steps(opt, ours, [grads[t], others[t]])
        for i, g in enumerate((grads[t], others[t])):
            if g is None:
                states[i].pop("neg_pre_grad", None)
            else:
                exact[i] = adan_reference(exact[i], g.double(), states[i])
            assert (ours[i] - exact[i]).abs().max() <= 1e-6 * exact[i].abs().max()
        if grads[t] is None:  # left alone, and its step count stands still
            before[1].pop("neg_pre_grad", None)
            assert torch.equal(ours[0], before[0]) and opt.state[ours[0]].keys() == before[1].keys()
            assert all(torch.equal(opt.state[ours[0]][key], value) for key, value in before[1].items())
    assert opt.state[ours[0]]["step"] == 4 and opt.state[ours[1]]["step"] == 6


@each_travel
@pytest.mark.parametrize("done", [2, 3, 4, 5])
def test_defect_skipped_parameter_keeps_a_stale_gradient_across_a_resume(travel, done):
    p, other = param(4, 3), param(5)
    runs = list(zip(skipping(p), noise(other, 6), strict=True))
    straight, halves = ([twin(p), twin(other)] for _ in range(2))
    settings = dict(lr=0.01, weight_decay=0.1)
    steps(Adan(straight, **settings), straight, *runs)
    opt = Adan(halves, **settings)
    steps(opt, halves, *runs[:done])  # before, in and after the pause
    opt, halves = travel(opt, halves)
    assert ("neg_pre_grad" in opt.state[halves[0]]) == (done not in (3, 4))
    steps(opt, halves, *runs[done:])
    assert all(torch.equal(a, b) for a, b in zip(straight, halves, strict=True))


def test_defect_skipped_group_counts_steps():
    p, q = param(3), param(3)
    theirs = [twin(p), twin(q)]
    opt = Released([{"params": theirs[:1]}, {"params": theirs[1:]}])
    steps(opt, theirs, *([g, None] for g in noise(p, 5)))
    assert opt.param_groups[1]["step"] == 5  # of a group that has not made a step
    ours = [twin(p), twin(q)]
    opt = Adan([{"params": ours[:1]}, {"params": ours[1:]}])
    steps(opt, ours, *([g, None] for g in noise(p, 5)))
    assert not opt.state.get(ours[1]) and all("step" not in group for group in opt.param_groups)
