"The step inside the backward pass: the ordinary step bit by bit, what it refuses, and what it saves."

import copy
import gc
import weakref

import pytest
import torch
from common import ConvNet, TransformerBlock, same_start
from torch import nn

from sgd_sai import SGDSaI, StepInBackward
from sgd_sai.benchmarks.measuring import allocated_peak

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")
SETTINGS = {
    "default": {},
    "no decay": dict(weight_decay=0.0),
    "no momentum": dict(momentum=0.0),
    "nesterov": dict(nesterov=True),
    "maximize": dict(maximize=True),
    "bf16 state": dict(state_dtype=torch.bfloat16),
    "int8 state": dict(state_dtype=torch.int8),
    "control": dict(scale="sqrt_numel"),
    "forloop": dict(foreach=False, fused=False),
    "foreach": dict(foreach=True),
    "fused": dict(fused=True),
    "tensor lr": dict(lr=torch.tensor(0.02)),
}


def both(model_class, dtype=torch.float32, max_norm=None, **kw):
    "The same model twice, one with ordinary steps, one with steps inside the backward pass."
    one = same_start(model_class).to(dtype)
    other = copy.deepcopy(one)
    ordinary, inside = (SGDSaI(m.named_parameters(), **{"lr": 0.02, **kw}) for m in (one, other))
    return one, ordinary, other, inside, StepInBackward(inside, max_norm)


def loss_of(model, batch):
    x, y = batch
    if x.is_floating_point():
        x = x.to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x), y)


def run(model_class, steps=6, max_norm=None, **kw):
    one, ordinary, other, inside, stepping = both(model_class, max_norm=max_norm, **kw)
    torch.manual_seed(1)
    for _ in range(steps):
        batch = model_class.batch()
        ordinary.zero_grad()
        loss_of(one, batch).backward()
        if max_norm:
            norm = nn.utils.clip_grad_norm_(one.parameters(), max_norm)
        ordinary.step()
        total = stepping.backward(loss_of(other, batch))
        assert all(p.grad is None for p in other.parameters())
        if max_norm:
            assert torch.equal(total, norm)
        inside.step()  # what a training loop does all the same
    return one, ordinary, other, inside


@pytest.mark.parametrize("kw", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("max_norm", [None, 0.1, 100.0])
@pytest.mark.parametrize("model_class", [ConvNet, TransformerBlock])
def test_bit_by_bit_the_ordinary_step(model_class, max_norm, kw):
    one, ordinary, other, inside = run(model_class, max_norm=max_norm, **kw)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert ordinary.scales() == inside.scales() and len(inside.scales()) == len(list(one.parameters()))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        for key, value in ordinary.state[p].items():
            assert (
                torch.equal(value, inside.state[q][key])
                if isinstance(value, torch.Tensor)
                else value == inside.state[q][key]
            )


@pytest.mark.parametrize("rounding", [None, "stochastic", "kahan"])
def test_in_pure_bfloat16(rounding):
    one, _, other, _ = run(TransformerBlock, dtype=torch.bfloat16, rounding=rounding)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_schedules_groups_and_checkpoints_go_on():
    one, ordinary, other, inside, stepping = both(ConvNet)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8) for opt in (ordinary, inside)]
    torch.manual_seed(1)
    for t in range(8):
        batch = ConvNet.batch()
        ordinary.zero_grad()
        loss_of(one, batch).backward()
        ordinary.step()
        loss_of(other, batch).backward()
        inside.step()
        for schedule in schedules:
            schedule.step()
        if t == 1:  # new dicts for the groups
            inside.load_state_dict(copy.deepcopy(inside.state_dict()))
        if t == 3:  # a new optimizer takes over
            saved = copy.deepcopy(inside.state_dict())
            stepping.remove()
            inside = SGDSaI(other.named_parameters(), lr=0.02)
            inside.load_state_dict(saved)
            stepping = StepInBackward(inside)
            schedules[1] = torch.optim.lr_scheduler.CosineAnnealingLR(inside, 8)
            schedules[1].load_state_dict(schedules[0].state_dict())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_shared_and_frozen_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid = nn.Embedding(12, 8), nn.Linear(8, 8)
            self.extra = nn.Linear(8, 8).requires_grad_(False)

        def forward(self, x):
            return self.extra(self.mid(self.embed(x))) @ self.embed.weight.T

    one, ordinary, other, inside, stepping = both(Tied)
    torch.manual_seed(1)
    for t in range(6):
        x, y = torch.randint(12, (5,)), torch.randint(12, (5,))
        if t == 3:
            for m in (one, other):
                m.extra.requires_grad_(True)
            stepping.attach()
        ordinary.zero_grad()
        nn.functional.cross_entropy(one(x), y).backward()
        ordinary.step()
        nn.functional.cross_entropy(other(x), y).backward()
        assert other.extra.weight.grad is None
    assert (
        all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
        and "extra.weight" in inside.scales()
    )


def test_parameters_without_a_hook_step_as_usual():
    one, ordinary, other, inside, stepping = both(ConvNet)
    stepping.hooks.pop(p := other[0].weight).remove()
    batch = ConvNet.batch()
    loss_of(one, batch).backward()
    ordinary.step()
    loss_of(other, batch).backward()
    assert p.grad is not None
    inside.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("count", [2, 3])
def test_micro_batches(count):
    one, ordinary, other, inside, stepping = both(TransformerBlock)
    torch.manual_seed(1)
    for _ in range(3):
        batches = [TransformerBlock.batch() for _ in range(count)]
        ordinary.zero_grad()
        for batch in batches:
            loss_of(one, batch).backward()
        ordinary.step()
        with stepping.no_step():
            for batch in batches[:-1]:
                loss_of(other, batch).backward()
        loss_of(other, batches[-1]).backward()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_after_remove_steps_are_ordinary():
    one, ordinary, other, inside, stepping = both(ConvNet)
    stepping.remove()
    batch = ConvNet.batch()
    for m, opt in ((one, ordinary), (other, inside)):
        loss_of(m, batch).backward()
        assert all(p.grad is not None for p in m.parameters())
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_errors_say_what_to_do_and_come_before_changes():
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="for SGDSaI, not for SGD"):
        StepInBackward(torch.optim.SGD(model.parameters(), lr=0.1))
    for key in ("normalize", "capturable", "differentiable"):
        with pytest.raises(RuntimeError, match=key):
            StepInBackward(SGDSaI(model.parameters(), **{key: True}))
    opt = SGDSaI(model.named_parameters())
    stepping = StepInBackward(opt, max_norm=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"call backward\(loss\)"):
        model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="zero_grad"):
        stepping.backward(model(torch.ones(1, 3)).sum())
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="the norm of the gradients is inf; nothing was changed"):
        stepping.backward(model(torch.full((1, 3), float("inf"))).sum())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) and not opt.state
    stepping.backward(model(torch.randn(4, 3)).square().sum())
    assert set(opt.scales()) == {"weight", "bias"}
    stepping.remove()
    StepInBackward(opt)
    fresh = nn.Linear(3, 2)
    StepInBackward(opt := SGDSaI(fresh.named_parameters()))
    with pytest.raises(RuntimeError, match="the first gradient of (weight|bias) is not finite"):
        fresh(torch.full((1, 3), float("nan"))).sum().backward()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="averaged"):
        StepInBackward(SGDSaI([nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_gradients_do_not_pile_up(max_norm):
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(10)])
    opt, x = SGDSaI(model.named_parameters(), lr=1e-3), torch.randn(2, 512)
    stepping = StepInBackward(opt, max_norm)
    stepping.backward(model(x).square().mean())
    size = sum(p.numel() * 4 for p in model.parameters())
    assert allocated_peak(lambda: stepping.backward(model(x).square().mean())) < 0.25 * size
    stepping.remove()

    def ordinary():
        model(x).square().mean().backward()
        opt.step()

    assert allocated_peak(ordinary) > 0.95 * size


def test_nothing_keeps_the_model_alive():
    model = nn.Linear(3, 2)
    opt = SGDSaI(model.named_parameters())
    stepping = StepInBackward(opt)
    stepping.backward(model(torch.randn(4, 3)).square().sum())
    gone = weakref.ref(model.weight)
    del model, opt, stepping
    gc.collect()
    assert gone() is None
