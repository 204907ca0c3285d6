"Restarts of Adan on request and by the paper's criterion, and runs that stop and resume around them."

import copy

import pytest
import torch
import torch._dynamo.testing
from adan_released import each_implementation
from common import (
    each_travel,
    noise,
    param,
    steps,
    through_deepcopy,
    twin,
)

import sgd_sai.adan_kernels
from sgd_sai.adan import Adan, adan_reference

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")


@each_implementation
def test_restart_on_request_for_all_and_for_some(flags):
    start = [param(4, 3), param(5), param(2, 2)]
    grads = list(zip(*(noise(p, 8) for p in start), strict=True))
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


OPTIONS = [
    dict(lr=0.02, weight_decay=0.5),
    dict(lr=0.05, betas=(0.9, 0.5, 0.95), eps=1e-3, weight_decay=0.3, no_prox=True),
    dict(lr=0.02, weight_decay=0.1),
]


def restarting(params, **flags):
    "Two groups with one radius, and one without."
    groups = zip((params[:2], params[2:4], params[4:]), OPTIONS, (RADIUS, RADIUS, None), strict=True)
    return Adan([{"params": ps, **options, "restart_radius": radius} for ps, options, radius in groups], **flags)


def restart_run(n=40):
    "Five parameters and the gradients of n steps; one has none in the first three steps, one has none in the eighth."
    params = [param(4, 3), param(5), param(3, 2, 2), param(), param(6)]
    grads = [[g + 1 for g in noise(p, n)] for p in params]
    grads[1][:3], grads[2][7] = [None] * 3, None
    return params, list(zip(*grads, strict=True))


def plain_python_restarts(params, grads):
    """The criterion in float64: the steps after which it asks for a restart, and the parameters after each step.

    It is t * sum of ||theta_t - theta_(t-1)||^2 > R^2, in the metric sqrt(n) + eps."""
    exact, states, path, when, tracks = [p.detach().double() for p in params], [{} for _ in params], 0.0, [], []
    for step, gs in enumerate(grads):
        for i, g in enumerate(gs):
            options = OPTIONS[i // 2]
            if g is None:
                states[i].pop("neg_pre_grad", None)
                continue
            new = adan_reference(exact[i], g.double(), states[i], **options)
            if i < 4:
                root = (
                    states[i]["exp_avg_sq"] / (1 - options.get("betas", (0, 0, 0.99))[2] ** states[i]["step"])
                ).sqrt()
                path += ((root + options.get("eps", 1e-8)) * (new - exact[i]) ** 2).sum().item()
            exact[i] = new
        far = max((s["step"] for s in states[:4] if s), default=0) * path / RADIUS**2
        assert abs(far - 1) > 1e-4  # else rounding would decide
        if far > 1:
            path, states[:4] = 0.0, [{} for _ in range(4)]
            when.append(step)
        tracks.append([p.clone() for p in exact])
    return when, tracks


@pytest.mark.parametrize("in_chunks", [False, True], ids=["whole", "in chunks"])
@pytest.mark.parametrize("flags", [{}, dict(foreach=True), dict(capturable=True)], ids=str)
def test_restart_radius_equals_the_criterion_in_plain_python(flags, in_chunks, monkeypatch):
    if in_chunks:
        monkeypatch.setattr(sgd_sai.adan_kernels, "CACHE_CHUNK", 3)
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
        for p, q in zip(ours, tracks[t], strict=True):
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
@pytest.mark.parametrize(
    "dtype, states",
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, dict(state_dtype=torch.float32))],
    ids=str,
)
def test_resume_in_the_middle_equals_the_straight_run(travel, flags, dtype, states):
    start, grads = restart_run(12)
    start, grads = (
        [param(*p.shape, dtype=dtype) for p in start],
        [[None if g is None else g.to(dtype) for g in gs] for gs in grads],
    )
    straight, halves = ([twin(p) for p in start] for _ in range(2))
    opt, other = restarting(straight, **flags, **states), restarting(halves, **flags, **states)
    steps(opt, straight, *grads)
    steps(other, halves, *grads[:7])
    kept = [copy.deepcopy(dict(other.state[p])) for p in halves]
    assert all("path" in s and s["path"].item() > 0 for s in kept[:4])
    new, halves = travel(other, halves)
    for p, old in zip(halves, kept, strict=True):
        assert new.state[p].keys() == old.keys()
        assert all(
            torch.equal(new.state[p][key], value) and new.state[p][key].dtype == value.dtype
            for key, value in old.items()
        )
    steps(new, halves, *grads[7:])
    assert (
        kept[0]["step"] < 7 and new.state[halves[4]]["step"] == 12 and new.state.get(halves[0], {}).get("step", 0) < 5
    )  # a restart before, and one after
    assert all(torch.equal(a, b) for a, b in zip(straight, halves, strict=True))


def test_deepcopy_and_original_go_their_own_ways():
    p = param(3)
    opt = Adan([p])
    steps(opt, [p], *([g] for g in noise(p, 2)))
    other, (q,) = through_deepcopy(opt, [p])
    steps(other, [q], *([g] for g in noise(p, 2)))
    assert opt.state[p]["step"] == 2 and other.state[q]["step"] == 4
