"""Adan beside the arithmetic of the released code (sail-sg/Adan), its four defects that must not be inherited, one test each, restarts, and what a step leaves alone.

"Equal to 1e-6" means, tensor by tensor, max|p - q| <= 1e-6 max|q|, where q is computed in float64 from the same float32 gradients: in float32 the released
code's own rounding over twenty steps is of that size.
"""
import copy
import io
import itertools
import math
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from common import (
    LAYOUTS,
    ConvNet,
    TransformerBlock,
    assert_same_path,
    each_travel,
    noise,
    param,
    peak_of_new_memory,
    recorded_gradients,
    same_start,
    steps,
    through_deepcopy,
    train,
    twin,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import sgd_sai.adan
import sgd_sai.pieces
from sgd_sai.adan import Adan, adan_reference
from sgd_sai.base import debias
from sgd_sai.pieces import WIDE

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")
IMPLEMENTATIONS = {
    "forloop": dict(foreach=False), "foreach": dict(foreach=True), "default": {}, "capturable": dict(capturable=True),
    "capturable forloop": dict(capturable=True, foreach=False),
}
each_implementation = pytest.mark.parametrize("flags", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


class Released(Optimizer):
    """What the released class computes and keeps, written anew from its arithmetic: one clock for a group, bias corrections from that clock, the last gradient with its
    sign changed, and gradients that are scaled in place to the `max_grad_norm` of the constructor."""

    def __init__(self, params, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, max_grad_norm=0.0, no_prox=False, foreach=True, fused=False):
        super().__init__(params, {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")})

    @torch.no_grad()
    def step(self):
        factor, members = 1.0, [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.defaults["max_grad_norm"]:
            norm = math.sqrt(sum(p.grad.square().sum().item() for _, p in members))
            factor = min(1.0, self.defaults["max_grad_norm"] / (norm + self.param_groups[-1]["eps"]))
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        for group, p in members:
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
            p -= lr / (1 - b1**t) * state["exp_avg"] / denominator + lr * b2 / (1 - b2**t) * state["exp_avg_diff"] / denominator
            if not group["no_prox"]:
                p /= 1 + lr * group["weight_decay"]

    @torch.no_grad()
    def restart_opt(self):
        for group in self.param_groups:
            group["step"] = 0
            for p in group["params"]:
                self.state[p].update({key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq", "exp_avg_diff")})


@pytest.fixture(scope="module", params=[ConvNet, TransformerBlock])
def task(request):
    "A model class and the gradients of 20 steps of training it."
    return request.param, recorded_gradients(request.param)


def two_groups(model, matrices_prox=True):
    "Matrices and the rest, which share no hyperparameter; one of them has the proximal decay, the other AdamW's."
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 0.01, "weight_decay": 0.1, "no_prox": not matrices_prox},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "lr": 0.003, "betas": (0.9, 0.7, 0.95), "eps": 1e-4, "weight_decay": 0.5, "no_prox": matrices_prox},
    ]


@pytest.fixture(scope="module")
def released_paths(task):
    "The parameters after each step of the released arithmetic in float64, for both ways to give the groups their forms of decay."
    model_class, grads = task
    paths = {}
    for matrices_prox in (True, False):
        exact = same_start(model_class).double()
        paths[matrices_prox] = train(exact, Released(two_groups(exact, matrices_prox)).step, grads)
    return paths


both_decays = pytest.mark.parametrize("matrices_prox", [True, False], ids=["matrices proximal", "matrices as AdamW"])


@each_implementation
@both_decays
def test_twenty_steps_equal_the_released_arithmetic(task, released_paths, flags, matrices_prox):
    model_class, grads = task
    model = same_start(model_class)
    opt = Adan(two_groups(model, matrices_prox), **flags)
    assert_same_path(train(model, opt.step, grads), released_paths[matrices_prox])


def test_twenty_compiled_steps_equal_the_released_arithmetic():
    torch._dynamo.reset()
    grads, counts = recorded_gradients(ConvNet), []
    model, exact = same_start(ConvNet), same_start(ConvNet).double()
    groups = two_groups(model)
    for group in groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(Adan(groups).step, backend=counter)

    def step():
        compiled()
        counts.append(counter.frame_count)

    assert_same_path(train(model, step, grads), train(exact, Released(two_groups(exact)).step, grads))
    assert 0 < counts[2] == counts[-1]  # not again in every step


@each_implementation
def test_state_equals_the_released_one(task, flags):
    model_class, grads = task
    model, exact = same_start(model_class), same_start(model_class).double()
    opt, reference = Adan(two_groups(model), **flags), Released(two_groups(exact))
    train(model, opt.step, grads), train(exact, reference.step, grads)
    for p, q in zip(model.parameters(), exact.parameters()):
        assert set(opt.state[p]) == set(reference.state[q]) | {"step"} and opt.state[p]["step"] == len(grads)
        for key, value in reference.state[q].items():
            assert opt.state[p][key].dtype == p.dtype
            assert (opt.state[p][key].double() - value).abs().max() <= 1e-6 * value.abs().max(), key


@both_decays
def test_steps_in_pieces_equal_the_released_arithmetic(task, released_paths, matrices_prox, monkeypatch):
    monkeypatch.setattr(sgd_sai.adan, "PIECE", 50)
    model_class, grads = task
    model = same_start(model_class)
    assert_same_path(train(model, Adan(two_groups(model, matrices_prox), foreach=False).step, grads), released_paths[matrices_prox])


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_first_step_is_lr_times_the_sign_of_the_gradient(dtype, flags):
    for g in (torch.tensor([3.0, -0.25, 40.0, -7.0, 1.5, -1e-2]), torch.tensor(-2.0)):
        g = torch.complex(g, -0.5 * g) if dtype.is_complex else g.to(dtype)
        p = nn.Parameter(torch.zeros_like(g))
        opt = Adan([p], lr=0.01, **flags)
        steps(opt, [p], [g])
        sign = torch.complex(g.real.sign(), g.imag.sign()) if dtype.is_complex else g.sign()
        torch.testing.assert_close(p.detach(), -0.01 * sign, rtol=2e-6, atol=0) if dtype not in (torch.bfloat16, torch.float16) else None
        assert dtype not in (torch.bfloat16, torch.float16) or torch.equal(p, torch.tensor(-0.01).to(dtype) * sign)


@each_implementation
@pytest.mark.parametrize("maximize", [False, True])
def test_two_steps_by_hand(flags, maximize):
    # all betas 1/2, gradients 4 and 2: m/c1 = 4, then 8/3; v/c2 = 0, then -4/3; n/c3 = 16, then 6; so u = 1, then (8/3 - 2/3)/sqrt 6
    sign, u = -1 if maximize else 1, 2 / math.sqrt(6)
    p, q = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    opt = Adan([{"params": [p]}, {"params": [q], "no_prox": True}], lr=0.1, betas=(0.5, 0.5, 0.5), eps=0, weight_decay=0.5, maximize=maximize, **flags)
    prox, adamw = 1.0, 1.0
    for g, update in ((4.0, 1.0), (2.0, u)):
        steps(opt, [p, q], [torch.tensor([g])] * 2)
        prox, adamw = (prox - sign * 0.1 * update) / 1.05, adamw * 0.95 - sign * 0.1 * update
        assert p.item() == pytest.approx(prox, rel=1e-6) and q.item() == pytest.approx(adamw, rel=1e-6)
    assert {key: opt.state[p][key].item() for key in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad", "step")} == dict(
        exp_avg=2, exp_avg_diff=-1, exp_avg_sq=4.5, neg_pre_grad=-2, step=2)


def test_bias_corrections_of_clocks_on_the_device_are_exact():
    # 1 - beta^t in float32 would have lost four digits where it matters most, in the first steps
    for beta, t in itertools.product((0.0, 0.5, 0.98, 0.999, 0.9999), (1, 2, 100, 100_000)):
        assert debias(beta, torch.tensor(float(t))).item() == pytest.approx(debias(beta, t), rel=3e-7) == pytest.approx(1 - beta**t, rel=1e-11)


@each_implementation
def test_defect_clipping_overwrites_the_gradient(flags):
    params, grads = [param(4, 3), param(7), param(2, 3, 2, 2)], []
    grads = [[g * 10 for g in noise(p, 4)] for p in params]

    theirs = [twin(p) for p in params]
    for p, gs in zip(theirs, grads):
        p.grad = gs[0].clone()
    Released(theirs, max_grad_norm=1.0).step()
    assert all((p.grad.norm() < 0.9 * gs[0].norm()) for p, gs in zip(theirs, grads))  # what was measured there afterwards, was of other gradients

    ours, exact = [twin(p) for p in params], [twin(p.double()) for p in params]
    opt, reference = Adan(ours, weight_decay=0.1, **flags), Released(exact, weight_decay=0.1)
    for t, clip in enumerate((False, True, True, False)):
        for p, q, gs in zip(ours, exact, grads):
            p.grad = gs[t].clone()
        if clip:
            clip_grad_norm_(ours, 1.0)
            assert sum(p.grad.square().sum() for p in ours) < 1.0001
        kept = [(p.grad, p.grad.clone(), p.grad._version) for p in ours]
        for p, q in zip(ours, exact):
            q.grad = p.grad.double()
        opt.step(), reference.step()
        for p, q, (grad, value, version) in zip(ours, exact, kept):
            assert p.grad is grad and grad._version == version and torch.equal(grad, value)
            assert (p - q).abs().max() <= 1e-6 * q.abs().max()


def test_defect_per_group_max_grad_norm_is_ignored():
    params = [param(4, 3), param(7)]
    grads = [10 * torch.randn_like(p) for p in params]

    theirs = [twin(p) for p in params]
    for p, g in zip(theirs, grads):
        p.grad = g.clone()
    Released([{"params": theirs[:1], "max_grad_norm": 0.5}, {"params": theirs[1:], "max_grad_norm": 2.0}]).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(theirs, grads))  # no word of it

    with pytest.raises(TypeError, match="max_grad_norm"):
        Adan(params, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="max_grad_norm.*clip_grad_norm_"):
        Adan([{"params": params, "max_grad_norm": 0.5}])
    ours, given = [twin(p) for p in params], [twin(p) for p in params]
    opt, other = (Adan([{"params": ps[:1]}, {"params": ps[1:]}]) for ps in (ours, given))
    for p, q, g, group, norm in zip(ours, given, grads, opt.param_groups, (0.5, 2.0)):  # what takes its place, each group with its own norm
        p.grad, q.grad = g.clone(), g * norm / g.norm()
        clip_grad_norm_(group["params"], norm)
    opt.step(), other.step()
    for p, q in zip(ours, given):
        torch.testing.assert_close(opt.state[p]["exp_avg"], other.state[q]["exp_avg"], rtol=1e-5, atol=1e-8)


@each_implementation
def test_defect_one_clock_for_a_group_leaves_late_parameters_without_bias_correction(flags):
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
        steps(opt, ours, [grads[id(early)][t], grads[id(late)][t] if t >= 300 else None, grads[id(added)][t] if t >= 302 else None])
        if t == 300:
            torch.testing.assert_close((ours[1] - late).detach(), -lr * grads[id(late)][300].sign(), rtol=1e-4, atol=0)
    for p, mine, start, rate in zip((early, late, added), ours, (0, 300, 302), (lr, lr, 0.1)):
        alone = twin(p)
        other = Adan([alone], lr=rate, **flags)
        steps(other, [alone], *([g] for g in grads[id(p)][start:]))
        assert torch.equal(mine, alone) and opt.state[mine]["step"] == 305 - start


def skipping(p, n=6, skipped=(2, 3)):
    "Gradients of n steps, none in the steps `skipped`, after which they are of another size."
    return [None if t in skipped else (100.0 if t > max(skipped) else 1.0) * torch.randn_like(p).abs() for t in range(n)]


@each_implementation
def test_defect_skipped_parameter_keeps_a_stale_gradient(flags):
    p, other = param(4, 3), param(5)
    grads, others = skipping(p), noise(other, 6)

    theirs = [twin(p), twin(other)]
    opt = Released(theirs)
    steps(opt, theirs, *zip(grads[:5], others))
    stale = (1 - 0.92) * (grads[4] - grads[1])
    assert (opt.state[theirs[0]]["exp_avg_diff"] - stale).norm() < 0.05 * stale.norm()  # a difference across three steps

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
        if grads[t] is None:  # left alone, and its clock stands still
            before[1].pop("neg_pre_grad", None)
            assert torch.equal(ours[0], before[0]) and opt.state[ours[0]].keys() == before[1].keys()
            assert all(torch.equal(opt.state[ours[0]][key], value) for key, value in before[1].items())
    assert opt.state[ours[0]]["step"] == 4 and opt.state[ours[1]]["step"] == 6


@each_travel
@pytest.mark.parametrize("done", [2, 3, 4, 5])
def test_defect_skipped_parameter_keeps_a_stale_gradient_across_a_resume(travel, done):
    p, other = param(4, 3), param(5)
    runs = list(zip(skipping(p), noise(other, 6)))
    straight, halves = ([twin(p), twin(other)] for _ in range(2))
    settings = dict(lr=0.01, weight_decay=0.1)
    steps(Adan(straight, **settings), straight, *runs)
    opt = Adan(halves, **settings)
    steps(opt, halves, *runs[:done])  # before, in and after the pause
    opt, halves = travel(opt, halves)
    assert ("neg_pre_grad" in opt.state[halves[0]]) == (done not in (3, 4))
    steps(opt, halves, *runs[done:])
    assert all(torch.equal(a, b) for a, b in zip(straight, halves))


def test_defect_skipped_group_keeps_its_clock():
    p, q = param(3), param(3)
    theirs = [twin(p), twin(q)]
    opt = Released([{"params": theirs[:1]}, {"params": theirs[1:]}])
    steps(opt, theirs, *([g, None] for g in noise(p, 5)))
    assert opt.param_groups[1]["step"] == 5  # of a group that has not made a step
    ours = [twin(p), twin(q)]
    opt = Adan([{"params": ours[:1]}, {"params": ours[1:]}])
    steps(opt, ours, *([g, None] for g in noise(p, 5)))
    assert not opt.state.get(ours[1]) and all("step" not in group for group in opt.param_groups)


@each_implementation
def test_restart_on_request_for_all_and_for_some(flags):
    start = [param(4, 3), param(5), param(2, 2)]
    grads = list(zip(*(noise(p, 8) for p in start)))
    for some in (None, [0, 2]):
        ours = [twin(p) for p in start]
        opt = Adan([{"params": ours[:2]}, {"params": ours[2:], "lr": 0.1}], **flags)
        steps(opt, ours, *grads[:5])
        at_restart = [twin(p) for p in ours]
        opt.restart(None if some is None else (ours[i] for i in some))
        restarted = range(3) if some is None else some
        assert [p in opt.state for p in ours] == [i not in restarted for i in range(3)]
        steps(opt, ours, *grads[5:])
        straight, late = [twin(p) for p in start], at_restart
        steps(Adan([{"params": straight[:2]}, {"params": straight[2:], "lr": 0.1}], **flags), straight, *grads)
        steps(Adan([{"params": late[:2]}, {"params": late[2:], "lr": 0.1}], **flags), late, *grads[5:])
        for i, p in enumerate(ours):
            assert torch.equal(p, late[i] if i in restarted else straight[i]) and not torch.equal(late[i], straight[i])


RADIUS = 0.9
OPTIONS = [dict(lr=0.02, weight_decay=0.5), dict(lr=0.05, betas=(0.9, 0.5, 0.95), eps=1e-3, weight_decay=0.3, no_prox=True), dict(lr=0.02, weight_decay=0.1)]


def restarting(params, **flags):
    "Two groups with one radius, and one without."
    groups = zip((params[:2], params[2:4], params[4:]), OPTIONS, (RADIUS, RADIUS, None))
    return Adan([{"params": ps, **options, "restart_radius": radius} for ps, options, radius in groups], **flags)


def restart_run(n=40):
    "Five parameters, one of which has no gradient in the first three steps and one in the eighth, and the gradients of n steps."
    params = [param(4, 3), param(5), param(3, 2, 2), param(), param(6)]
    grads = [[g + 1 for g in noise(p, n)] for p in params]
    grads[1][:3], grads[2][7] = [None] * 3, None
    return params, list(zip(*grads))


def plain_python_restarts(params, grads):
    "The criterion in float64: parameters after each step, and the steps after which t * sum of ||theta_t - theta_(t-1)||^2, in the metric sqrt(n) + eps, exceeds R^2."
    exact, states, path, when, tracks = [p.detach().double() for p in params], [{} for _ in params], 0.0, [], []
    for step, gs in enumerate(grads):
        for i, g in enumerate(gs):
            options = OPTIONS[i // 2]
            if g is None:
                states[i].pop("neg_pre_grad", None)
                continue
            new = adan_reference(exact[i], g.double(), states[i], **options)
            if i < 4:
                root = (states[i]["exp_avg_sq"] / (1 - options.get("betas", (0, 0, 0.99))[2] ** states[i]["step"])).sqrt()
                path += ((root + options.get("eps", 1e-8)) * (new - exact[i]) ** 2).sum().item()
            exact[i] = new
        far = max((s["step"] for s in states[:4] if s), default=0) * path / RADIUS**2
        assert abs(far - 1) > 1e-4  # else rounding would decide
        if far > 1:
            path, states[:4] = 0.0, [{} for _ in range(4)]
            when.append(step)
        tracks.append([p.clone() for p in exact])
    return when, tracks


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize("flags", [{}, dict(foreach=True), dict(capturable=True)], ids=str)
def test_restart_radius_equals_the_criterion_in_plain_python(flags, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr(sgd_sai.adan, "PIECE", 3)
    start, grads = restart_run()
    when, tracks = plain_python_restarts(start, grads)
    assert 3 <= len(when) <= 20
    ours = [twin(p) for p in start]
    opt, mine = restarting(ours, **flags), []
    for t, gs in enumerate(grads):
        steps(opt, ours, gs)
        if not any(p in opt.state for p in ours[:4]):
            mine.append(t)
        assert "path" not in opt.state[ours[4]] and opt.state[ours[4]]["step"] == t + 1  # has no radius, takes no part
        for p, q in zip(ours, tracks[t]):
            assert (p - q).abs().max() <= 1e-5 * q.abs().max()
    assert mine == when


def test_restart_radius_is_about_each_radius_alone():
    p, q = param(4), param(4)
    opt = Adan([{"params": [p], "restart_radius": 1e-6}, {"params": [q], "restart_radius": 1e6}])
    for _ in range(3):
        steps(opt, [p, q], [torch.ones(4)] * 2)
        assert p not in opt.state and q in opt.state
    assert opt.state[q]["step"] == 3


@each_travel
@pytest.mark.parametrize("flags", [{}, dict(capturable=True)], ids=str)
@pytest.mark.parametrize("dtype, states", [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, dict(state_dtype=torch.float32))], ids=str)
def test_resume_in_the_middle_equals_the_straight_run(travel, flags, dtype, states):
    start, grads = restart_run(12)
    start, grads = [param(*p.shape, dtype=dtype) for p in start], [[None if g is None else g.to(dtype) for g in gs] for gs in grads]
    straight, halves = ([twin(p) for p in start] for _ in range(2))
    opt, other = restarting(straight, **flags, **states), restarting(halves, **flags, **states)
    steps(opt, straight, *grads)
    steps(other, halves, *grads[:7])
    kept = [copy.deepcopy(dict(other.state[p])) for p in halves]
    assert all("path" in s and s["path"].item() > 0 for s in kept[:4])
    new, halves = travel(other, halves)
    for p, old in zip(halves, kept):
        assert new.state[p].keys() == old.keys()
        assert all(torch.equal(new.state[p][key], value) and new.state[p][key].dtype == value.dtype for key, value in old.items())
    steps(new, halves, *grads[7:])
    assert kept[0]["step"] < 7 and new.state[halves[4]]["step"] == 12 and new.state.get(halves[0], {}).get("step", 0) < 5  # a restart before, and one after
    assert all(torch.equal(a, b) for a, b in zip(straight, halves))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    "Of one process: what matters here is the type of the tensors."
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('mesh') / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kw", [{}, dict(foreach=True), dict(capturable=True, no_prox=True), dict(restart_radius=0.05)], ids=str)
def test_sharded_tensors(mesh, kw):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    start, grads = param(4, 3), [torch.randn(4, 3) for _ in range(6)]
    whole, sharded = twin(start), nn.Parameter(distribute_tensor(start.detach().clone(), mesh, [Shard(0)]))
    opt, other = Adan([whole], weight_decay=0.1, **kw), Adan([sharded], weight_decay=0.1, **kw)
    for g in grads:
        whole.grad, sharded.grad = g.clone(), distribute_tensor(g.clone(), mesh, [Shard(0)])
        opt.step(), other.step()
        assert (whole in opt.state) == (sharded in other.state)
    torch.testing.assert_close(sharded.full_tensor().detach(), whole.detach(), rtol=1e-6, atol=1e-7)
    assert all(isinstance(other.state[sharded][key], DTensor) for key in ("exp_avg", "neg_pre_grad") if sharded in other.state)


def from_file(opt):
    "The state of `opt` after a journey through a file."
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continued(task, flags, done, **settings):
    "The released arithmetic for `done` steps in float32; then its path in float64, and Adan's path with its file loaded; Adan, and what was warned about."
    model_class, grads = task
    theirs = same_start(model_class)
    reference = Released(two_groups(theirs), **settings)
    train(theirs, reference.step, grads[:done])
    saved, model = from_file(reference), same_start(model_class)
    model.load_state_dict(theirs.state_dict())
    opt = Adan([{"params": group["params"]} for group in two_groups(model)], **flags)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(saved)
    exact = theirs.double()  # the same parameters, so the same optimizer goes on; only its state has to follow
    for state in reference.state.values():
        state.update({key: value.double() for key, value in state.items()})
    reference.defaults["max_grad_norm"] = 0.0
    return train(exact, reference.step, grads[done:]), train(model, opt.step, grads[done:]), opt, caught


@each_implementation
@pytest.mark.parametrize("done", [1, 7])
def test_released_checkpoints_continue(task, flags, done):
    theirs, mine, opt, caught = continued(task, {k: v for k, v in flags.items() if k == "capturable"}, done)
    assert_same_path(mine, theirs)
    assert not caught
    for group in opt.param_groups:  # nothing foreign is left, nothing of ours is missing
        assert not {"step", "max_grad_norm", "fused"} & group.keys() and opt.defaults.keys() <= group.keys()
        for p in group["params"]:
            assert opt.state[p]["step"] == len(task[1]) and isinstance(opt.state[p]["step"], torch.Tensor)
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.003] and [group["no_prox"] for group in opt.param_groups] == [False, True]


def test_released_checkpoints_with_clipping_continue_with_a_warning(task):
    theirs, mine, _, caught = continued(task, {}, 5, max_grad_norm=0.5)
    assert_same_path(mine, theirs)
    assert caught and all("clipping gradients at norm 0.5: call torch.nn.utils.clip_grad_norm_ before step" in str(w.message) for w in caught)
    assert all(w.filename == __file__ for w in caught)  # it points at the line that loads


def test_released_checkpoints_continue_after_a_restart():
    start = [param(4, 3), param(5)]
    grads = list(zip(*(noise(p, 9) for p in start)))
    theirs, ours, fresh = ([twin(p) for p in start] for _ in range(3))
    reference = Released(theirs, foreach=False)
    steps(reference, theirs, *grads[:5])
    reference.restart_opt()
    opt = Adan(ours)
    opt.load_state_dict(from_file(reference))
    for p, q, r in zip(theirs, ours, fresh):
        q.data.copy_(p), r.data.copy_(p)
    steps(reference, theirs, *grads[5:])
    steps(opt, ours, *grads[5:])
    steps(Adan(fresh, foreach=False), fresh, *grads[5:])
    for p, q, r in zip(theirs, ours, fresh):
        assert torch.equal(q, r) and (q - p).abs().max() <= 1e-6 * p.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@each_implementation
def test_gradients_are_left_alone(dtype, flags):
    params = [param(*shape, dtype=dtype) for shape in ((), (7,), (4, 6), (3, 4, 2, 2), (0, 3))]
    params.append(nn.Parameter(torch.randn(2, 4, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)))
    params.append(nn.Parameter(torch.randn(5, 4).to(dtype).t()))
    for variant in ({}, dict(no_prox=True), dict(maximize=True), dict(restart_radius=0.01), dict(state_dtype=torch.float32)):
        opt = Adan(params, weight_decay=0.1, **variant, **flags)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)  # contiguous, even where the parameter is not
            kept = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
            opt.step()
            for p, (grad, value, version) in zip(params, kept):
                assert p.grad is grad and grad._version == version and torch.equal(grad, value)


@each_implementation
def test_nothing_is_printed(task, flags, capfd):
    model_class, grads = task
    model = same_start(model_class)
    opt = Adan(two_groups(model), restart_radius=1e-3, **flags)
    train(model, opt.step, grads[:3])
    opt.load_state_dict(opt.state_dict())
    opt.restart()
    train(model, opt.step, grads[3:5])
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


ENTRIES = 1 << 22
BUDGET = 2 * 4 * 6 * WIDE + 100_000  # float32 copies of two pieces of parameter, gradient and four states
assert BUDGET < 4 * ENTRIES  # bytes of the smallest parameter below


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kw", [*IMPLEMENTATIONS.values(), dict(foreach=False, no_prox=True, maximize=True), dict(foreach=False, betas=(0.9, 0.0, 0.9)),
                                dict(foreach=True, no_prox=True, maximize=True), dict(capturable=True, no_prox=True, foreach=False)], ids=str)
def test_step_allocates_nothing_of_parameter_size(dtype, kw):
    n = ENTRIES if dtype == torch.float32 else 2 * ENTRIES
    p = nn.Parameter(torch.empty(2048, n // 2048, dtype=dtype).uniform_(-1, 1))
    p.grad = torch.empty_like(p).uniform_(-1, 1)
    opt = Adan([p], weight_decay=0.1, **kw)
    opt.step()
    assert peak_of_new_memory(opt.step) <= BUDGET


@pytest.mark.parametrize("flags", [dict(foreach=False), dict(foreach=True)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_step_allocates_nothing_of_parameter_size_in_any_memory_layout(flags, layout):
    p = nn.Parameter(layout[0](torch.empty(512, ENTRIES // (512 * 16), 4, 4).uniform_(-1, 1)))
    p.grad = layout[1](p.detach().clone(memory_format=torch.contiguous_format))
    opt = Adan([p], weight_decay=0.1, **flags)
    opt.step()
    assert peak_of_new_memory(opt.step) <= BUDGET


def test_deepcopy_and_original_go_their_own_ways():
    p = param(3)
    opt = Adan([p])
    steps(opt, [p], *([g] for g in noise(p, 2)))
    other, (q,) = through_deepcopy(opt, [p])
    steps(other, [q], *([g] for g in noise(p, 2)))
    assert opt.state[p]["step"] == 2 and other.state[q]["step"] == 4
