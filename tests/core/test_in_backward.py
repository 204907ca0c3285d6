"The step inside the backward pass: the ordinary step bit by bit, what it refuses, and what it saves."

import copy
import gc
import pickle
import weakref

import pytest
import torch
from common import ConvNet, TransformerBlock, same_start
from torch import nn

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI, StepInBackward
from sgd_sai.benchmarks.measuring import allocated_peak

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")
OF_ALL = {
    "default": {},
    "no decay": dict(weight_decay=0.0),
    "maximize": dict(maximize=True),
    "bf16 state": dict(state_dtype=torch.bfloat16),
    "bf16 state to nearest": dict(state_dtype=torch.bfloat16, rounding="nearest"),
    "foreach": dict(foreach=True),
    "tensor lr": dict(lr=torch.tensor(0.02)),
}
SETTINGS = {  # of each class that can step one parameter at a time
    SGDSaI: {
        **OF_ALL,
        "no momentum": dict(momentum=0.0),
        "nesterov": dict(nesterov=True),
        "int8 state": dict(state_dtype=torch.int8),
        "control": dict(scale="sqrt_numel"),
        "forloop": dict(foreach=False, fused=False),
        "fused": dict(fused=True),
    },
    Adan: {
        **OF_ALL,
        "decay": dict(weight_decay=0.1),
        "as AdamW": dict(weight_decay=0.1, no_prox=True),
        "no differences": dict(betas=(0.9, 0.0, 0.9)),
        "forloop": dict(foreach=False),
    },
    MuonSaI: {
        **OF_ALL,
        "no momentum": dict(momentum=0.0, nesterov=False, rest_momentum=0.0),
        "int8 state": dict(state_dtype=torch.int8),
        "lengths and iterations": dict(adjust_lr="match_rms_adamw", ns_steps=3, ns_coefficients="polar_express"),
        "forloop": dict(foreach=False, fused=False),
        "fused": dict(fused=True, rest="sgd_sai"),
        "sgd_sai": dict(rest="sgd_sai"),
        **{rest: dict(rest=rest) for rest in ("sign", "row_norm", "adams", "scion")},
        "row_norm, int8 state": dict(rest="row_norm", state_dtype=torch.int8),
    },
}
CASES = {f"{cls.__name__}, {name}": (cls, kw) for cls, settings in SETTINGS.items() for name, kw in settings.items()}
each_case = pytest.mark.parametrize("cls, kw", CASES.values(), ids=CASES)
each_class = pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
NEED_ALL = {  # settings with which no parameter can step before all gradients are there
    SGDSaI: (dict(normalize=True), dict(capturable=True), dict(differentiable=True)),
    Adan: (dict(restart_radius=0.0), dict(capturable=True), dict(differentiable=True)),
    MuonSaI: (dict(capturable=True),),
}


def marked(model):
    "Groups for MuonSaI, in the order of the parameters: all matrices but embeddings are hidden ones."
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return [{"params": [(name, p)], "muon": p.ndim > 1 and p not in tables} for name, p in model.named_parameters()]


def built(cls, model, **kw):
    return cls(marked(model) if cls is MuonSaI else model.named_parameters(), **{"lr": 0.02, **kw})


def both(cls, model_class, dtype=torch.float32, max_norm=None, **kw):
    "The same model twice, one with ordinary steps, one with steps inside the backward pass."
    one = same_start(model_class).to(dtype)
    other = copy.deepcopy(one)
    ordinary, inside = (built(cls, m, **kw) for m in (one, other))
    return one, ordinary, other, inside, StepInBackward(inside, max_norm)


def loss_of(model, batch):
    x, y = batch
    if x.is_floating_point():
        x = x.to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x), y)


def assert_equal(one, ordinary, other, inside):
    "Parameters and state are the same to the last bit."
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        mine, theirs = ordinary.state.get(p, {}), inside.state.get(q, {})
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            equal = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
            assert equal, key


def run(cls, model_class, steps=6, max_norm=None, **kw):
    one, ordinary, other, inside, stepping = both(cls, model_class, max_norm=max_norm, **kw)
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


@each_case
@pytest.mark.parametrize("max_norm", [None, 0.1, 100.0])
@pytest.mark.parametrize("model_class", [ConvNet, TransformerBlock])
def test_bit_by_bit_the_ordinary_step(model_class, max_norm, cls, kw):
    one, ordinary, other, inside = run(cls, model_class, max_norm=max_norm, **kw)
    assert_equal(one, ordinary, other, inside)
    assert len(inside.state) == len(list(one.parameters()))


@each_class
@pytest.mark.parametrize("rounding", [None, "nearest", "stochastic", "kahan"])
def test_in_pure_bfloat16(cls, rounding):
    assert_equal(*run(cls, TransformerBlock, dtype=torch.bfloat16, rounding=rounding))


@each_class
def test_schedules_groups_and_checkpoints_go_on(cls):
    one, ordinary, other, inside, stepping = both(cls, ConvNet)
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
            inside = built(cls, other)
            inside.load_state_dict(saved)
            stepping = StepInBackward(inside)
            schedules[1] = torch.optim.lr_scheduler.CosineAnnealingLR(inside, 8)
            schedules[1].load_state_dict(schedules[0].state_dict())
    assert_equal(one, ordinary, other, inside)


@each_class
def test_shared_and_frozen_parameters(cls):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid = nn.Embedding(12, 8), nn.Linear(8, 8)
            self.extra = nn.Linear(8, 8).requires_grad_(False)

        def forward(self, x):
            return self.extra(self.mid(self.embed(x))) @ self.embed.weight.T

    one, ordinary, other, inside, stepping = both(cls, Tied)
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
    assert_equal(one, ordinary, other, inside)
    assert inside.state[other.extra.weight]


@each_class
def test_parameters_without_a_hook_step_as_usual(cls):
    one, ordinary, other, inside, stepping = both(cls, ConvNet)
    stepping.hooks.pop(p := other[0].weight).remove()
    for _ in range(3):
        batch = ConvNet.batch()
        loss_of(one, batch).backward()
        ordinary.step()
        ordinary.zero_grad()
        loss_of(other, batch).backward()
        assert p.grad is not None
        inside.step()
        inside.zero_grad()
    assert_equal(one, ordinary, other, inside)


@each_class
@pytest.mark.parametrize("count", [2, 3])
def test_micro_batches(cls, count):
    one, ordinary, other, inside, stepping = both(cls, TransformerBlock)
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
    assert_equal(one, ordinary, other, inside)


@each_class
def test_after_remove_steps_are_ordinary(cls):
    one, ordinary, other, inside, stepping = both(cls, ConvNet)
    stepping.remove()
    batch = ConvNet.batch()
    for m, opt in ((one, ordinary), (other, inside)):
        loss_of(m, batch).backward()
        assert all(p.grad is not None for p in m.parameters())
        opt.step()
    assert_equal(one, ordinary, other, inside)


@pytest.mark.parametrize("cls", [torch.optim.SGD, AdaHessian], ids=lambda cls: cls.__name__)
def test_optimizers_that_cannot_are_refused_by_a_list_of_those_that_can(cls):
    with pytest.raises(TypeError, match=rf"for SGDSaI, MuonSaI, Adan, and .*SingleSteps, not for {cls.__name__}: call"):
        StepInBackward(cls(nn.Linear(3, 2).parameters(), lr=0.1))


@pytest.mark.parametrize("cls, kw", [(cls, kw) for cls in SETTINGS for kw in NEED_ALL[cls]], ids=str)
def test_settings_that_need_all_gradients_are_refused(cls, kw):
    with pytest.raises(RuntimeError, match=f"`{next(iter(kw))}` does not go with a step inside the backward pass"):
        StepInBackward(built(cls, nn.Linear(3, 2), **kw))


@each_class
@pytest.mark.parametrize("max_norm", ["large", -1.0, float("nan")], ids=str)
def test_a_max_norm_that_is_no_norm_is_refused(cls, max_norm):
    "A negative one would turn every step around."
    opt = built(cls, nn.Linear(3, 2))
    with pytest.raises(ValueError, match="Invalid max_norm value"):
        StepInBackward(opt, max_norm=max_norm)
    for text, value in (("0.5", 0.5), ("none", None), ("inf", float("inf"))):
        assert StepInBackward(opt, max_norm=text).max_norm == value


@each_class
def test_errors_say_what_to_do_and_come_before_changes(cls):
    model = nn.Linear(3, 2)
    opt = built(cls, model)
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
    assert set(opt.state) == set(model.parameters())


def test_a_first_gradient_that_is_not_finite_is_refused_by_name():
    fresh = nn.Linear(3, 2)
    StepInBackward(SGDSaI(fresh.named_parameters()))
    with pytest.raises(RuntimeError, match="the first gradient of (weight|bias) is not finite"):
        fresh(torch.full((1, 3), float("nan"))).sum().backward()


@each_class
def test_a_sparse_gradient_is_refused_by_name(cls):
    net = nn.Embedding(5, 3, sparse=True)
    opt, kept = built(cls, net), net.weight.detach().clone()
    StepInBackward(opt)
    with pytest.raises(RuntimeError, match="does not support sparse gradients, which parameter weight has"):
        net(torch.tensor([1])).sum().backward()
    assert torch.equal(net.weight, kept) and not opt.state


@each_class
def test_several_processes_are_refused(cls, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="averaged"):
        StepInBackward(built(cls, nn.Linear(3, 2)))


@each_class
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_gradients_do_not_pile_up(cls, max_norm):
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(10)])
    opt, x = built(cls, model, lr=1e-3), torch.randn(2, 512)
    stepping = StepInBackward(opt, max_norm)
    stepping.backward(model(x).square().mean())
    size = sum(p.numel() * 4 for p in model.parameters())
    work = 3 * 512 * 512 * 4 if cls is MuonSaI else 0  # the factor of one matrix, and two products to find it
    assert allocated_peak(lambda: stepping.backward(model(x).square().mean())) < 0.25 * size + work
    stepping.remove()

    def ordinary():
        model(x).square().mean().backward()
        opt.step()

    assert allocated_peak(ordinary) > 0.95 * size


@each_class
def test_nothing_keeps_the_model_alive(cls):
    model = nn.Linear(3, 2)
    opt = built(cls, model)
    stepping = StepInBackward(opt)
    stepping.backward(model(torch.randn(4, 3)).square().sum())
    gone = weakref.ref(model.weight)
    del model, opt, stepping
    gc.collect()
    assert gone() is None


class Experts(nn.Module):
    "Three layers, of which each batch uses some."

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), nn.Linear(4, 1)

    def forward(self, x, used):
        return self.head(sum(self.experts[i](x).tanh() for i in used)).square().mean()


ROUTES = ([0, 1], [1], [0, 2], [2], [0, 1, 2], [1], [0, 1])
LOOPS = {  # what comes after the backward pass in which the parameters have stepped
    "step": lambda opt: opt.step(),
    "no step": lambda opt: None,
    "saved and loaded": lambda opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())),
}


@each_class
@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("after", LOOPS)
def test_parameters_without_a_gradient_are_treated_as_in_the_ordinary_step(cls, after, max_norm):
    one, ordinary, other, inside, stepping = both(cls, Experts, max_norm=max_norm)
    for used in ROUTES:
        x = torch.randn(8, 4)
        ordinary.zero_grad()
        one(x, used).backward()
        if max_norm:
            nn.utils.clip_grad_norm_(one.parameters(), max_norm)
        ordinary.step()
        stepping.backward(other(x, used))
        assert_equal(one, ordinary, other, inside)  # a checkpoint may be written now
        LOOPS[after](inside)
        assert_equal(one, ordinary, other, inside)


def test_a_step_without_any_gradient_drops_the_last_ones():
    one, ordinary, other, inside, _ = both(Adan, Experts)
    x = torch.randn(8, 4)
    for used in ([0, 1, 2], None, [0, 1]):
        ordinary.zero_grad()
        if used:
            one(x, used).backward()
            other(x, used).backward()
        ordinary.step()
        inside.step()
        assert_equal(one, ordinary, other, inside)


def test_micro_batches_with_other_parameters():
    "A parameter that the last micro-batch does not use waits for `step`."
    one, ordinary, other, inside, stepping = both(Adan, Experts)
    for first, last in (([0, 1], [1, 2]), ([0], [1]), ([2], [0, 1]), ([0, 2], [0, 2])):
        x = torch.randn(8, 4)
        ordinary.zero_grad()
        one(x, first).backward()
        one(x, last).backward()
        ordinary.step()
        with stepping.no_step():
            other(x, first).backward()
        other(x, last).backward()
        inside.step()
        inside.zero_grad()
        assert_equal(one, ordinary, other, inside)


@pytest.mark.parametrize("call_step", [True, False])
def test_ordinary_steps_after_remove_drop_last_gradients(call_step):
    one, ordinary, other, inside, stepping = both(Adan, Experts)
    for t, used in enumerate(ROUTES):
        if t == 3:
            stepping.remove()
        x = torch.randn(8, 4)
        for net, opt in ((one, ordinary), (other, inside)):
            opt.zero_grad()
            net(x, used).backward()
            if call_step or t >= 3 or opt is ordinary:
                opt.step()
        assert_equal(one, ordinary, other, inside)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda objects: pickle.loads(pickle.dumps(objects))])
def test_a_copy_between_backward_pass_and_step_keeps_the_last_gradients(travel):
    one, ordinary, other, inside, stepping = both(Adan, Experts)
    for t in range(4):
        x = torch.randn(8, 4)
        ordinary.zero_grad()
        one(x, [0, 1]).backward()
        ordinary.step()
        other(x, [0, 1]).backward()
        if t == 1:
            other, inside, stepping = travel((other, inside, stepping))
        inside.step()
        assert_equal(one, ordinary, other, inside)


def test_a_pass_with_an_error_drops_nothing():
    net = nn.Linear(3, 2)
    opt = built(Adan, net)
    StepInBackward(opt)
    net(torch.randn(4, 3)).sum().backward()
    before, kept = net.weight.detach().clone(), opt.state[net.bias]["neg_pre_grad"].clone()
    x = torch.randn(2, 3, requires_grad=True).exp()
    x.register_hook(lambda g: 1 / 0)  # runs after the weight has its gradient
    with pytest.raises(ZeroDivisionError):
        (net.weight * x).sum().backward()
    assert not torch.equal(net.weight, before) and torch.equal(opt.state[net.bias]["neg_pre_grad"], kept)
    net.bias.sum().backward()  # what has stepped in the pass before does not count in this one
    assert "neg_pre_grad" in opt.state[net.bias] and "neg_pre_grad" not in opt.state[net.weight]
