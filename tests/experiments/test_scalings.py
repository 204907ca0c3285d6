"The rules of other scales: each against its formula, what waits, and what is kept; peers that need the model."

import math

import pytest
import torch
from torch import nn

from sgd_sai import SGDSaI
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.optimizers import build_optimizer, get_optimizer
from sgd_sai.experiments.scaled_sgdm import (
    MAX_ROW_RATIO,
    MIN_WEIGHT_RMS,
    RULES,
    STEP_RULES,
    TRACKED_BETA,
    WARM_STEPS,
    ScaledSGDM,
)
from sgd_sai.experiments.state_rules import state_bytes
from sgd_sai.experiments.tasks.vision import build_digits_vit, build_small_resnet
from sgd_sai.scale_rules import SCALE_RULES, register_scale_rule


def rms(x):
    return x.square().mean().sqrt().item()


def stepped(rule, gradients, start=None, **settings):
    "A parameter and its optimizer after one step for each gradient."
    p = nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    opt = ScaledSGDM([p], **{"lr": 0.1, "momentum": 0.9, "rule": rule, **settings})
    for g in gradients:
        p.grad = g.clone()
        opt.step()
    return p.detach(), opt.state[p]


def some(steps, shape=(6, 10)):
    torch.manual_seed(0)
    return [torch.randn(shape) * (i + 1) for i in range(steps)]


@pytest.mark.parametrize("rule", list(RULES))
def test_first_step_is_the_gradient_times_the_scale(rule):
    g = some(1)[0]
    start = torch.full_like(g, 0.5)
    scale = {
        "none": 1,
        "gsnr": (g.norm() / g.std()).item(),
        "sqrt_numel": math.sqrt(60),
        "sqrt_fan_in": math.sqrt(10),
        "inverse_rms": 1 / rms(g),
        "warm_batches": 1 / rms(g),
        "weight_over_gradient": 0.5 / rms(g),
        "rows": 1 / g.square().mean(1, keepdim=True).sqrt(),
        "tracked": 1 / rms(g),
    }[rule]
    torch.testing.assert_close(stepped(rule, [g], start)[0], start - 0.1 * scale * g)


@pytest.mark.parametrize("rule", ["gsnr", "inverse_rms", "weight_over_gradient", "rows"])
def test_scales_at_initialization_stay(rule):
    first, later = stepped(rule, some(1))[1]["scale"], stepped(rule, some(5))[1]["scale"]
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(later))


def test_momentum_and_decay_are_those_of_sgd_sai():
    gradients, start = some(6), torch.ones(6, 10)
    q = nn.Parameter(start.clone())
    opt = SGDSaI([q], lr=0.1, weight_decay=0.3)
    for g in gradients:
        q.grad = g.clone()
        opt.step()
    torch.testing.assert_close(stepped("gsnr", gradients, start, weight_decay=0.3)[0], q.detach())


def test_warm_batches_average_and_stop():
    gradients = some(WARM_STEPS + 3)
    expected = sum(1 / rms(g) for g in gradients[:WARM_STEPS]) / WARM_STEPS
    assert stepped("warm_batches", gradients)[1]["scale"] == pytest.approx(expected, rel=1e-5)


def test_tracked_is_the_bias_corrected_average():
    gradients, v = some(4), 0.0
    for g in gradients:
        v = TRACKED_BETA * v + (1 - TRACKED_BETA) * rms(g) ** 2
    assert stepped("tracked", gradients)[1]["scale"] == pytest.approx((v / (1 - TRACKED_BETA**4)) ** -0.5, rel=1e-5)


def test_rows_wait_for_their_first_gradient_and_are_held():
    first, second = some(2, (3, 8))
    first[1] = 0
    first[2] *= 1e-6
    p, state = stepped("rows", [first])
    assert (
        not p[1].any()
        and state["scale"][1] == 0
        and state["scale"][2].item() == pytest.approx(MAX_ROW_RATIO / rms(first), rel=1e-5)
    )
    _, state = stepped("rows", [first, second])
    assert state["scale"][1].item() == pytest.approx(1 / rms(second[1]), rel=1e-5) and state["scale"][
        0
    ].item() == pytest.approx(1 / rms(first[0]), rel=1e-5)
    vector, later = some(2, (8,))
    assert stepped("rows", [vector, later])[1]["scale"] == stepped("rows", [vector])[1]["scale"]


def test_zeros_wait_and_zero_weights_count_as_small():
    zero, g = torch.zeros(6, 10), some(1)[0]
    for rule in ("inverse_rms", "weight_over_gradient", "rows", "warm_batches"):
        p, state = stepped(rule, [zero])
        assert not p.any() and state["scale"] is None
        assert stepped(rule, [zero, g])[1]["scale"] is not None
    assert stepped("weight_over_gradient", [g])[1]["scale"] == pytest.approx(MIN_WEIGHT_RMS / rms(g), rel=1e-5)


def test_names_and_errors():
    entry = get_optimizer("scaled:rows")
    assert (entry.cls, entry.settings) == (ScaledSGDM, {"rule": "rows"})
    with pytest.raises(UsageError, match="did you mean rows"):
        get_optimizer("scaled:row")
    with pytest.raises(ValueError, match="Invalid rule"):
        ScaledSGDM([nn.Parameter(torch.zeros(1))], lr=0.1, rule="row")
    with pytest.raises(ValueError, match="Invalid learning rate"):
        ScaledSGDM([nn.Parameter(torch.zeros(1))], lr=-0.1)


@pytest.mark.parametrize(
    "build", [lambda: build_digits_vit({}), lambda: build_small_resnet({}, blocks=1, channels=1)], ids=["vit", "resnet"]
)
@pytest.mark.parametrize(
    "name,most", [("adam_mini", 4.6), ("po:Lion", 4.0), ("muon_adamw", 6.0), ("muon_sai", 4.2), ("scaled:rows", 5.0)]
)
def test_peers_step_and_keep_what_they_say(build, name, most):
    "Every peer moves every parameter, and keeps about one tensor per parameter (Muon with AdamW two for the rest)."
    torch.manual_seed(0)
    model = build()
    opt = build_optimizer(name, model, {"lr": 1e-3, "weight_decay": 0.1})
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        opt.zero_grad()
        out = model(torch.randn(4, 1, 8, 8))
        nn.functional.cross_entropy(getattr(out, "logits", out), torch.arange(4)).backward()
        opt.step()
    assert all(
        not torch.equal(a, b)
        for a, b, p in zip(before, model.parameters(), model.parameters(), strict=True)
        if p.grad is not None and p.grad.any()
    )
    assert state_bytes(opt) <= most * sum(p.numel() for p in model.parameters())


# --- rules in SCALE_RULES ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["none", "sqrt_fan_in", "inverse_rms", "weight_over_gradient"])
def test_rules_that_are_asked_once_are_scales_of_sgd_sai(rule):
    "One tensor of each kind: a matrix, a kernel, a vector; and a gradient of zero, which has to wait."
    gradients = [some(4, shape) for shape in ((6, 10), (4, 3, 2, 2), (5,))]
    start = [torch.full_like(g[0], 0.5) for g in gradients]
    gradients[0][0].zero_()
    results = []
    for optimizer_class, settings in ((SGDSaI, {"scale": rule}), (ScaledSGDM, {"rule": rule})):
        params = [nn.Parameter(p.clone()) for p in start]
        opt = optimizer_class(params, lr=0.01, weight_decay=0.0, **settings)
        for step in range(4):
            for p, g in zip(params, gradients, strict=True):
                p.grad = g[step].clone()
            opt.step()
        results.append([p.detach() for p in params])
    skipped = 0 if rule in ("inverse_rms", "weight_over_gradient") else 1  # data-free rules start with momentum zero
    for ours, scaled in zip(results[0][skipped:], results[1][skipped:], strict=True):
        torch.testing.assert_close(ours, scaled)


def test_a_rule_of_the_user_can_be_trained_as_scaled():
    register_scale_rule("three", lambda grad, param: torch.tensor(3.0))
    try:
        assert "three" in RULES and get_optimizer("scaled:three").settings == {"rule": "three"}
        g = some(1)[0]
        torch.testing.assert_close(stepped("three", [g])[0], -0.1 * 3 * g)
    finally:
        del SCALE_RULES["three"]


def test_rules_with_a_memory_are_no_scales_of_sgd_sai():
    for rule in STEP_RULES:
        with pytest.raises(ValueError, match="Invalid scale"):
            SGDSaI([nn.Parameter(torch.zeros(1))], scale=rule)


def test_the_rule_gsnr_waits_for_a_gradient_as_sgd_sai_does():
    p, state = stepped("gsnr", [torch.zeros(6, 10)])
    assert state["scale"] is None and "momentum_buffer" not in state
    assert stepped("gsnr", [torch.zeros(6, 10), some(1)[0]])[1]["scale"] == pytest.approx(math.sqrt(60), rel=0.1)
