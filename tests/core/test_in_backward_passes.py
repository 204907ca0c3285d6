"""Backward passes in which a step would use a gradient that is incomplete, scaled, or wanted again: refused before
anything steps. And hooks that were attached twice, copied, or belong to parameters that have left the optimizer."""

import copy
import gc
import pickle

import pytest
import torch
from common import param
from torch import nn
from torch.utils.checkpoint import checkpoint

from sgd_sai import Adan, MuonSaI, SGDSaI, StepInBackward
from sgd_sai.step_in_backward import GradientHooks

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]
each_class = pytest.mark.parametrize("cls", [SGDSaI, Adan, MuonSaI], ids=lambda cls: cls.__name__)
REENTRANT = r"does not go with reentrant checkpoints.*use_reentrant=False"


class Net(nn.Module):
    "A layer that is used `uses` times, each in a checkpoint, between two others."

    def __init__(self, uses=2, outside=False, use_reentrant=True, ends=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.uses, self.outside, self.use_reentrant, self.ends = uses, outside, use_reentrant, ends

    def forward(self, x):
        x = self.first(x) if self.ends else x.repeat(1, 2)[:, :4]
        for _ in range(self.uses):
            x = checkpoint(lambda x: self.middle(x).tanh(), x, use_reentrant=self.use_reentrant)
        x = self.middle(x) if self.outside else x
        return self.last(x) if self.ends else x


def batch():
    return torch.randn(8, 3, requires_grad=True)


def loss_of(net, x):
    return net(x).square().mean()


def everything(net, opt):
    "What a refused step must not change."
    states = [dict(opt.state.get(p, {})) for p in net.parameters()]
    return copy.deepcopy(([p.detach() for p in net.parameters()], states))


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def built(cls, net, **options):
    params = list(net.named_parameters())
    if cls is MuonSaI:
        params = [{"params": [named], "muon": named[1].ndim > 1} for named in params]
    return cls(params, **{"lr": 0.02, **options})


def both(cls, make, **options):
    "A model with ordinary steps and the same with steps inside the backward pass."
    one = make()
    other = copy.deepcopy(one)
    ordinary, inside = (built(cls, m, **options) for m in (one, other))
    return one, ordinary, other, inside, StepInBackward(inside)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


# --- reentrant checkpoints --------------------------------------------------------------------------------------------

NETS = {
    "used twice": {},
    "used once": dict(uses=1),
    "used inside and outside": dict(uses=1, outside=True),
    "nothing outside": dict(ends=False),
}


@each_class
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("options", NETS.values(), ids=NETS)
def test_reentrant_checkpoints_are_refused_before_anything_steps(cls, options, max_norm):
    net = Net(**options)
    opt = built(cls, net)
    stepping = StepInBackward(opt, max_norm)
    before = everything(net, opt)
    for way in (lambda: loss_of(net, batch()).backward(), lambda: stepping.backward(loss_of(net, batch()))):
        with pytest.raises(RuntimeError, match=REENTRANT):
            way()
        assert_same(everything(net, opt), before)
        opt.zero_grad()


@each_class
@pytest.mark.parametrize("outside", [False, True])
def test_checkpoints_that_are_not_reentrant_make_no_difference(cls, outside):
    one, ordinary, other, inside, _ = both(cls, lambda: Net(outside=outside, use_reentrant=False))
    for t in range(4):
        torch.manual_seed(t)
        x = batch()
        ordinary.zero_grad()
        loss_of(one, x).backward()
        ordinary.step()
        loss_of(other, x).backward()
        inside.step()
    assert_same(list(one.parameters()), list(other.parameters()))


@each_class
def test_a_reentrant_checkpoint_that_comes_later_is_refused_by_the_name_of_the_parameter(cls):
    net = Net(use_reentrant=False)
    opt = built(cls, net)
    StepInBackward(opt)
    loss_of(net, batch()).backward()
    opt.step()
    net.use_reentrant, kept = True, net.middle.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"middle\.(weight|bias) was not changed.*use_reentrant=False"):
        loss_of(net, batch()).backward()
    assert torch.equal(net.middle.weight, kept)


@each_class
def test_reentrant_checkpoints_may_add_up_gradients(cls):
    one, ordinary, other, inside, stepping = both(cls, Net)
    x = batch()
    loss_of(one, x).backward()
    ordinary.step()
    with stepping.no_step():
        loss_of(other, x).backward()
    inside.step()
    assert_same(list(one.parameters()), list(other.parameters()))


class Nested(torch.autograd.Function):
    "A checkpoint of another library: its backward pass runs another one."

    @staticmethod
    def forward(ctx, x, layer):
        ctx.x, ctx.layer = x.detach(), layer
        return layer(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            ctx.layer(x).backward(g)
        return x.grad, None


@each_class
def test_any_backward_pass_inside_another_one_is_refused(cls):
    layer = nn.Linear(3, 3)
    opt = built(cls, layer)
    StepInBackward(opt)
    before, x = everything(layer, opt), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"(weight|bias) was not changed"):
        Nested.apply(Nested.apply(x, layer), layer).square().sum().backward()
    assert_same(everything(layer, opt), before)


# --- scaled losses ----------------------------------------------------------------------------------------------------

SCALED = {
    "plain": lambda scaler, loss: scaler.scale(loss),
    "divided for accumulation": lambda scaler, loss: scaler.scale(loss) / 4,
    "a sum of two": lambda scaler, loss: scaler.scale(loss) + scaler.scale(loss * 0.5),
    "a list": lambda scaler, loss: scaler.scale([loss])[0],
    "several at once, averaged": lambda scaler, loss: scaler.scale(torch.stack([loss, loss * 0.5])).mean(),
    "a stack, added up": lambda scaler, loss: torch.stack(scaler.scale([loss, loss * 0.5])).sum(),
}


@each_class
@pytest.mark.parametrize("scale", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_loss_scaled_by_a_grad_scaler_is_refused_before_anything_steps(cls, scale, max_norm):
    net, scaler = small(), torch.amp.GradScaler("cpu")
    opt = built(cls, net)
    stepping = StepInBackward(opt, max_norm)
    before = everything(net, opt)
    for backward in (torch.Tensor.backward, stepping.backward):
        with pytest.raises(RuntimeError, match=r"does not go with GradScaler.*nothing was changed"):
            backward(scale(scaler, loss_of(net, batch())))
        assert_same(everything(net, opt), before)
        opt.zero_grad()


@each_class
def test_products_and_scalers_that_are_no_scaled_loss_are_not_refused(cls):
    def step(net, loss, stepping, explicit=False):
        kept = net[0].weight.detach().clone()
        stepping.backward(loss) if explicit else loss.backward()
        assert not torch.equal(net[0].weight, kept)
        stepping.attach()  # the loss is looked at again

    net = small()
    stepping = StepInBackward(built(cls, net))
    off, unused = torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")
    step(net, loss_of(net, batch()) * 0.5, stepping)
    step(net, off.scale(loss_of(net, batch()) * 0.5), stepping)
    unused.scale(torch.ones(()))  # is in use from here on, for something else
    step(net, loss_of(net, batch()), stepping)
    step(net, loss_of(net, batch()) * 0.5, stepping, explicit=True)
    step(net, loss_of(net, batch()) * torch.tensor(2.0), stepping, explicit=True)
    with pytest.raises(RuntimeError, match=r"stepping\.backward\(loss\) in place of loss\.backward\(\)"):
        (loss_of(net, batch()) * 0.5).backward()


@each_class
def test_scalers_of_the_past_are_forgotten(cls):
    net = small()
    stepping = StepInBackward(built(cls, net))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    del scaler
    gc.collect()
    (loss_of(net, batch()) * 0.5).backward()
    assert stepping.passes == 1 and all(p.grad is None for p in net.parameters())


# --- gradients that are wanted again, or added up ---------------------------------------------------------------------


@each_class
def test_create_graph_is_refused_before_anything_steps(cls):
    net = small()
    opt = built(cls, net)
    StepInBackward(opt)
    before = everything(net, opt)
    with pytest.raises(RuntimeError, match="does not go with create_graph=True"):
        loss_of(net, batch()).backward(create_graph=True)
    assert_same(everything(net, opt), before)


@pytest.mark.parametrize(
    "cls, options",
    [
        *(
            (SGDSaI, options)
            for options in ({}, dict(fused=True), dict(foreach=True), dict(foreach=False, fused=False))
        ),
        *((Adan, options) for options in ({}, dict(foreach=True), dict(foreach=False))),
    ],
    ids=str,
)
@pytest.mark.usefixtures("kernels_for_small_tensors_too")  # fused ones leave no trace that autograd looks for
def test_a_second_backward_pass_over_a_kept_graph_is_an_error(cls, options):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    stepping = StepInBackward(built(cls, net, **options))
    loss = loss_of(net, batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert stepping.passes == 1  # before anything steps


@each_class
def test_two_losses_of_one_forward_pass_are_added_up_with_no_step(cls):
    one, ordinary, other, inside, stepping = both(cls, small)
    x = batch()
    for net, opt in ((one, ordinary), (other, inside)):
        out = net(x)
        first, second = out.square().mean(), out.abs().sum()
        if opt is ordinary:
            first.backward(retain_graph=True)
            second.backward()
        else:
            with stepping.no_step():
                first.backward(retain_graph=True)
            second.backward()
        opt.step()
    assert_same(list(one.parameters()), list(other.parameters()))


@each_class
def test_accumulation_without_no_step_is_told_at_the_step(cls):
    net = small()
    opt = built(cls, net)
    stepping = StepInBackward(opt)
    for count in (1, 1, 3, 1):
        for _ in range(count):
            loss_of(net, batch()).backward()
        kept = everything(net, opt)
        if count > 1:
            with pytest.raises(RuntimeError, match=rf"{count} backward passes have stepped.*no_step\(\)"):
                opt.step()
        else:
            opt.step()
        assert_same(everything(net, opt), kept)
    for count in (2, 3):  # two losses, of which only the last steps
        with stepping.no_step():
            for _ in range(count):
                loss_of(net, batch()).backward()
        loss_of(net, batch()).backward()
        opt.step()
    for _ in range(3):  # these steps were asked for
        stepping.backward(loss_of(net, batch()))
    opt.step()
    for _ in range(2):
        loss_of(net, batch()).backward()
    stepping.remove()
    opt.step()


# --- options that change after the hooks were attached ----------------------------------------------------------------


NEED_ALL = [(SGDSaI, key) for key in ("normalize", "capturable", "differentiable")]
NEED_ALL += [(Adan, key) for key in ("restart_radius", "capturable", "differentiable")]
NEED_ALL += [(MuonSaI, "capturable")]


@pytest.mark.parametrize("cls, key", NEED_ALL, ids=str)
@pytest.mark.parametrize("way", ["in the group", "loaded", "a new group"])
def test_options_that_need_all_gradients_are_refused_when_they_come_later(cls, key, way):
    net = small()
    opt = built(cls, net)
    StepInBackward(opt)
    if way == "in the group":
        opt.param_groups[0][key] = True
    elif way == "loaded":
        opt.load_state_dict(built(cls, small(), **{key: True}).state_dict())
    else:
        opt.add_param_group({"params": [("more", param(2))], key: True})
    before = everything(net, opt)
    with pytest.raises(RuntimeError, match=key):
        loss_of(net, batch()).backward()
    assert_same(everything(net, opt), before)


@each_class
def test_several_processes_are_refused_when_they_come_later(cls, monkeypatch):
    net = small()
    opt = built(cls, net)
    StepInBackward(opt)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="averaged"):
        loss_of(net, batch()).backward()
    assert not opt.state


# --- hooks that were attached twice, copied, or belong to others ------------------------------------------------------


def run_cell(cls, net, **options):
    "A cell of a notebook."
    opt = built(cls, net)
    return opt, StepInBackward(opt, **options)


@each_class
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("same_optimizer", [True, False])
def test_hooks_that_are_attached_again_replace_the_old_ones(cls, same_optimizer, times):
    one, ordinary, other, inside, stepping = both(cls, small)
    kept = [stepping]
    for _ in range(times - 1):
        if not same_optimizer:
            inside = built(cls, other)
        kept.append(StepInBackward(inside))
    for t in range(3):
        torch.manual_seed(t)
        x = batch()
        ordinary.zero_grad()
        loss_of(one, x).backward()
        ordinary.step()
        loss_of(other, x).backward()
        inside.step()
    assert_same(list(one.parameters()), list(other.parameters()))
    assert not any(each.hooks for each in kept[:-1]) and len(kept[-1].hooks) == 4
    assert inside._gradient_hooks == kept[-1:] and len(inside._optimizer_step_pre_hooks) == 1
    assert same_optimizer or not kept[0].optimizer.state


@each_class
def test_hooks_of_other_parameters_stay_when_some_are_taken_over(cls):
    body, head = nn.Linear(3, 4), nn.Linear(4, 1)
    old_opt, old = run_cell(cls, nn.Sequential(body, head))
    new_opt, new = run_cell(cls, head)
    loss_of(nn.Sequential(body, head), batch()).backward()
    assert set(old_opt.state) == set(body.parameters()) and set(new_opt.state) == set(head.parameters())
    old.attach()
    assert not new.hooks and len(old.hooks) == 4


@each_class
def test_attaching_again_adds_no_second_hook(cls):
    net = small()
    opt, stepping = run_cell(cls, net)
    stepping.attach()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in net.parameters())
    assert opt._gradient_hooks == [stepping] and len(opt._optimizer_step_pre_hooks) == 1


@each_class
def test_the_factor_of_clipping_is_forgotten_after_its_backward_pass(cls):
    net = small()
    opt, stepping = run_cell(cls, net, max_norm=0.1)
    stepping.backward(loss_of(net, batch()))
    before = everything(net, opt)
    with pytest.raises(RuntimeError, match=r"call backward\(loss\)"):
        loss_of(net, batch()).backward()
    assert_same(everything(net, opt), before)


@each_class
def test_attach_after_remove_steps_again(cls):
    net = small()
    opt, stepping = run_cell(cls, net)
    stepping.remove()
    assert not opt._gradient_hooks and not opt._optimizer_step_pre_hooks
    stepping.attach()
    loss_of(net, batch()).backward()
    assert all(p.grad is None for p in net.parameters()) and opt._gradient_hooks == [stepping]


def through_pickle(*objects):
    return pickle.loads(pickle.dumps(objects))


def through_deepcopy(*objects):
    return copy.deepcopy(objects)


@each_class
@pytest.mark.parametrize("travel", [through_pickle, through_deepcopy])
@pytest.mark.parametrize("with_hooks", [True, False])
def test_copies_train_as_the_original(cls, travel, with_hooks):
    one, ordinary, other, inside, stepping = both(cls, small)

    def train(net, opt, seed):
        torch.manual_seed(seed)
        x = batch()
        opt.zero_grad()
        loss_of(net, x).backward()
        opt.step()

    train(one, ordinary, 1), train(other, inside, 1)
    if with_hooks:
        copied, copied_opt, copied_stepping = travel(other, inside, stepping)
        assert len(copied_stepping.hooks) == 4 and copied_stepping.optimizer is copied_opt
        assert not {*map(id, copied_stepping.hooks)} & {*map(id, stepping.hooks)}
    else:
        copied, copied_opt = travel(other, inside)
    train(one, ordinary, 2), train(other, inside, 2), train(copied, copied_opt, 2)
    assert_same(list(one.parameters()), list(other.parameters()))
    assert_same(list(one.parameters()), list(copied.parameters()))
    assert all((p.grad is None) == with_hooks for p in copied.parameters())
    assert len(stepping.hooks) == 4


@each_class
@pytest.mark.parametrize("travel", [through_pickle, through_deepcopy])
def test_a_copy_of_removed_hooks_stays_removed(cls, travel):
    net = small()
    opt, stepping = run_cell(cls, net)
    stepping.remove()
    net, opt, stepping = travel(net, opt, stepping)
    loss_of(net, batch()).backward()
    assert not stepping.hooks and all(p.grad is not None for p in net.parameters())


@each_class
def test_parameters_that_have_left_the_optimizer_keep_their_gradients(cls):
    net = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    groups = [{"params": list(layer.named_parameters(prefix=str(i))), "lr": 0.1} for i, layer in enumerate(net)]
    opt = cls([group | ({"muon": False} if cls is MuonSaI else {}) for group in groups])
    StepInBackward(opt)
    del opt.param_groups[0]  # the groups behind it move up
    opt.param_groups[1]["lr"] = 0.0
    kept = [[p.detach().clone() for p in layer.parameters()] for layer in net]
    net[2](net[1](net[0](torch.randn(4, 3)))).square().mean().backward()
    assert [all(p.grad is None for p in layer.parameters()) for layer in net] == [False, True, True]
    moved = [not all(map(torch.equal, layer.parameters(), old)) for layer, old in zip(net, kept, strict=True)]
    assert moved == [False, True, False] and set(opt.state) == {*net[1].parameters(), *net[2].parameters()}


@each_class
def test_a_hook_finds_the_group_that_its_parameter_is_in_now(cls):
    p, q = param(3), param(3)
    mark = {"muon": False} if cls is MuonSaI else {}
    opt = cls([{"params": [p], "lr": 0.0, **mark}, {"params": [q], "lr": 0.1, **mark}])
    StepInBackward(opt)
    opt.param_groups[0]["params"], opt.param_groups[1]["params"] = [q], [p]
    kept = p.detach().clone(), q.detach().clone()
    (p * torch.randn(3) + q * torch.randn(3)).sum().backward()
    assert not torch.equal(p, kept[0]) and torch.equal(q, kept[1])


@each_class
def test_hooks_that_only_report_are_not_replaced(cls):
    class Count(GradientHooks):
        count = 0

        def ready(self, p, group):
            self.count += 1

    net = small()
    opt = built(cls, net)
    counts = [Count(opt), Count(opt)]
    StepInBackward(opt)
    loss_of(net, batch()).backward()
    assert [each.count for each in counts] == [4, 4] and all(p.grad is None for p in net.parameters())


# --- shapes, devices and dtypes ---------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("new", [(9, 4), (2, 4), (4, 6)], ids=str)
def test_a_parameter_whose_shape_has_changed_does_not_step(cls, new):
    p, average = param(6, 4), "exp_avg" if cls is Adan else "momentum_buffer"
    opt = cls([{"params": [("p", p)], **({"muon": True} if cls is MuonSaI else {})}])
    StepInBackward(opt)
    p.square().sum().backward()
    p.data = torch.randn(new)
    before, state = p.detach().clone(), copy.deepcopy(dict(opt.state[p]))
    with pytest.raises(RuntimeError, match=rf"state of p does not fit: {average} has the shape \(6, 4\)"):
        p.square().sum().backward()
    assert torch.equal(p, before) and str(state) == str(dict(opt.state[p]))


def train_inside(cls, max_norm, **options):
    net = small().float().cpu()
    opt = built(cls, net, **options)
    stepping = StepInBackward(opt, max_norm)
    x = torch.arange(24, dtype=torch.float32, device="cpu").view(8, 3) / 24
    return net, stepping, x


def go_on(net, stepping, x):
    for t in range(4):
        norm = stepping.backward(loss_of(net, x))
        if t == 1:
            net, stepping = copy.deepcopy((net, stepping))
    states = [dict(stepping.optimizer.state[p]) for p in net.parameters()]
    for state in states:
        state["step"] = float(state.get("step", 0))  # Adan's has the default dtype, as PyTorch's optimizers
    return [p.detach() for p in net.parameters()], states, norm


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize(
    "cls, options",
    [
        *((SGDSaI, dict(state_dtype=dtype)) for dtype in (None, torch.bfloat16, torch.int8)),
        *((Adan, dict(state_dtype=dtype)) for dtype in (None, torch.bfloat16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("other", ["meta", torch.float64], ids=str)
def test_another_default_device_or_dtype_makes_no_difference(other, cls, options, max_norm):
    expected, start = go_on(*train_inside(cls, max_norm, **options)), train_inside(cls, max_norm, **options)
    choose = torch.set_default_device if other == "meta" else torch.set_default_dtype
    choose(other)
    try:
        found = go_on(*start)
        empty = start[1].norm(torch.zeros((), device="cpu", dtype=torch.float32, requires_grad=True) * 1)
        assert empty == 0 and empty.device.type == "cpu" and empty.dtype == torch.float32
    finally:
        choose(None if other == "meta" else torch.float32)
    assert_same(found, expected)
