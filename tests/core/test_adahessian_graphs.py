"""A gradient without a graph is constant, or its graph was lost: the first has curvature zero, the second is an error
that names the parameter and says what to do. And what the second backward pass cannot do is said before any step."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from adahessian_shared import assert_refused, assert_same_run, everything, same, small_data, small_net
from common import param, through_deepcopy, through_pickle
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

from sgd_sai import AdaHessian, Adan, SGDSaI
from sgd_sai.hutchinson import hutchinson_diagonal

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]
REENTRANT = r"reentrant checkpoint.*use_reentrant=False"


class Net(nn.Module):
    "Three layers, of which the middle one is in a checkpoint; with `tied` it is used once more outside of it."

    def __init__(self, use_reentrant=True, tied=False, last=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.options, self.tied, self.has_last = use_reentrant, tied, last

    def forward(self, x):
        x = self.first(x)
        x = x if self.options is None else checkpoint(self.inner, x, use_reentrant=self.options)
        x = self.inner(x) if self.options is None or self.tied else x
        return self.last(x) if self.has_last else x

    def inner(self, x):
        return self.middle(x.tanh()).tanh()


def run(net, steps=3, **options):
    "Parameters and states after some steps."
    opt = AdaHessian([p for p in net.parameters() if p.requires_grad], lr=0.05, **options)
    for t in range(steps):
        opt.zero_grad()
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(t))
        net(x).square().mean().backward(create_graph=True)
        opt.step()
    params = [p.detach() for p in net.parameters()]
    return params, [dict(opt.state[p]) for p in net.parameters() if p.requires_grad]


# --- reentrant checkpoints --------------------------------------------------------------------------------------------


def frozen(net, *names):
    for name in names:
        getattr(net, name).requires_grad_(False)
    return net


NETS = {
    "between other layers": (Net(), r"first\.weight"),
    "a layer is used outside as well": (Net(tied=True), r"first\.weight"),
    "the last layer is in it": (Net(last=False), r"first\.weight"),
    "no layer before it": (frozen(Net(), "first"), r"middle\.weight"),
    "frozen layers in it, a layer before it": (frozen(Net(), "middle", "last"), r"first\.(weight|bias)"),
    "frozen layers in it, and after it a layer": (frozen(Net(), "middle"), r"first\.weight"),
}


@pytest.mark.parametrize("net, name", NETS.values(), ids=NETS)
@pytest.mark.parametrize("done", [0, 2])
def test_reentrant_checkpoints_are_refused_with_the_name_of_a_parameter(net, name, done):
    net = copy.deepcopy(net)
    params = [p for p in net.parameters() if p.requires_grad]
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    opt = AdaHessian([(n, p) for n, p in named if "last" not in n] + [(n, p) for n, p in named if "last" in n])
    x = torch.randn(8, 3, requires_grad=True)
    for _ in range(done):
        net.options = False
        opt.zero_grad()
        net(x).square().mean().backward(create_graph=True)
        opt.step()
        net.options = True
    opt.zero_grad()
    net(x).square().mean().backward(create_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused(opt, params, RuntimeError, rf"that of {name} for instance: a {REENTRANT}")


@pytest.mark.parametrize("options", [{}, dict(n_samples=2), dict(update_period=2)], ids=str)
def test_checkpoints_that_are_not_reentrant_make_no_difference(options):
    assert_same_run(run(Net(use_reentrant=False), **options), run(Net(use_reentrant=None), **options), rtol=0, atol=0)


def test_a_layer_beside_a_reentrant_checkpoint_goes_on():
    net, other = Net(), nn.Linear(3, 1)
    opt = AdaHessian(other.parameters())
    x = torch.randn(8, 3)
    (net(x) + other(x)).square().mean().backward(create_graph=True)
    opt.step()  # the curvature of `other` takes no way through the checkpoint
    assert all(opt.state[p]["exp_hessian_diag_sq"].all() for p in other.parameters())


# --- other ways to lose a graph ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", [0, 1, 2])
def test_one_micro_batch_without_create_graph_is_refused(without):
    net, (x, y) = small_net(), (t.float() for t in small_data(9))
    params, opt = list(net.parameters()), AdaHessian(net.named_parameters())
    for i, (xs, ys) in enumerate(zip(x.chunk(3), y.chunk(3), strict=True)):
        (F.mse_loss(net(xs), ys) / 3).backward(create_graph=i != without)
    assert_refused(opt, params, RuntimeError, r"6 of 6 .*that of 0\.weight .*create_graph=True\), in each of several")


def lose_by_assigning(p):
    p.grad = p.grad.detach().clone()


def lose_in_place(p):
    p.grad.detach_()


def lose_by_replacing(p):
    p.grad = torch.randn_like(p)


@pytest.mark.parametrize("lose", [lose_by_assigning, lose_in_place, lose_by_replacing])
def test_a_graph_lost_after_the_backward_pass_is_refused_by_name(lose):
    net, (x, y) = small_net(), (t.float() for t in small_data())
    params, opt = list(net.parameters()), AdaHessian(net.named_parameters())
    F.mse_loss(net(x), y).backward(create_graph=True)
    lose(net[3].weight)
    assert_refused(opt, params, RuntimeError, r"1 of 6 .*that of 3\.weight .*it had a graph after the backward pass")


def test_a_graph_lost_between_two_micro_batches_is_refused_by_name():
    p, q = param(3), param(3)
    opt = AdaHessian([("p", p), ("q", q)])
    (p**4 + q**4).sum().backward(create_graph=True)
    p.grad.detach_()
    (p**4 + q**4).sum().backward(create_graph=True)
    assert p.grad.requires_grad
    assert_refused(opt, [p, q], RuntimeError, r"1 of 2 .*that of p .*call optimizer\.zero_grad\(\) first")


def test_gradients_set_by_hand_need_a_graph_or_a_mark_that_they_are_constant():
    p, slope = param(3), torch.randn(3)
    start = p.detach().clone()
    opt = AdaHessian([("p", p)], lr=1e-4, eps=1e-2)
    p.grad = slope.clone()
    assert_refused(
        opt, [p], RuntimeError, r"that of p .*create_graph=True\). If p\.grad is set by hand.*requires_grad_"
    )
    p.grad = slope.clone().requires_grad_()
    opt.step()
    torch.testing.assert_close(p.detach(), start - 1e-2 * slope)  # curvature zero
    assert not p.grad.requires_grad
    (p.grad,) = torch.autograd.grad((p**2).sum(), p, create_graph=True)
    opt.step()
    assert opt.state[p]["exp_hessian_diag_sq"].all()


def test_numbers_left_from_an_earlier_step_are_refused():
    p = param(3)
    opt = AdaHessian([("p", p)])
    for t in range(2):
        (p**4).sum().backward(create_graph=True)
        if t == 0:
            opt.step()
    assert_refused(opt, [p], RuntimeError, r"that of p .*call optimizer\.zero_grad\(\) first")


class Cubed(torch.autograd.Function):
    "x^3, with a backward pass of which PyTorch is told that it has no derivative."

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Detached(Cubed):
    "x^3, with a backward pass that cuts the graph and says nothing."

    @staticmethod
    def backward(ctx, g):
        return (3 * ctx.saved_tensors[0] ** 2 * g).detach()


class Twice(Cubed):
    "x^3, with a backward pass that can be differentiated."

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


@pytest.mark.parametrize("function", [Cubed, Detached])
def test_functions_that_cut_the_graph_are_refused_by_name(function):
    p, q = param(3), param(3)
    opt = AdaHessian([("p", p), ("q", q)])
    (function.apply(p).sum() + (q**4).sum()).backward(create_graph=True)
    assert not p.grad.requires_grad
    assert_refused(opt, [p, q], RuntimeError, r"that of p .*torch\.autograd\.Function.*p\.grad\.requires_grad_\(\)")
    opt.zero_grad()
    (Twice.apply(p).sum() + (q**4).sum()).backward(create_graph=True)
    torch.testing.assert_close(hutchinson_diagonal([p.grad], [p])[0], 6 * p.detach())


@pytest.mark.parametrize("batches", [1, 2])
def test_once_differentiable_functions_are_said_to_have_no_second_derivative(batches):
    p = param(3)
    opt = AdaHessian([("p", p)])
    Cubed.apply(p).square().sum().backward(create_graph=True)
    if batches == 2:
        p.pow(4).sum().backward(create_graph=True)
    assert_refused(opt, [p], RuntimeError, "p: an operation of this model has no second derivative")


def test_hooks_on_a_parameter_that_detach_its_gradient_are_refused_by_name():
    p, q = param(3), param(3)
    p.register_hook(lambda g: g.detach())
    opt = AdaHessian([("p", p), ("q", q)])
    (p**4 + q**4).sum().backward(create_graph=True)
    assert_refused(opt, [p, q], RuntimeError, r"that of p .*or a hook, which may have cut the graph")


def test_an_older_optimizer_of_the_same_parameters_is_not_in_the_way():
    p, q = param(3), param(3)
    older = AdaHessian([("p", p), ("q", q)])  # a cell of a notebook that was run twice
    opt = AdaHessian([("p", p), ("q", q)], lr=1e-4)
    with pytest.warns(UserWarning, match="the gradient of q is constant"):
        (p**4 + q).sum().backward(create_graph=True)
        opt.step()
    assert not older.state and opt.state[q]["step"] == 1


def test_backward_hooks_of_a_module_that_detach_are_refused_by_name():
    net = nn.Sequential(nn.Linear(3, 2), nn.Identity())
    net[1].register_full_backward_hook(lambda module, given, got: (got[0].detach(),))
    opt = AdaHessian(net.named_parameters())
    net(torch.randn(4, 3)).square().mean().backward(create_graph=True)
    assert_refused(opt, list(net.parameters()), RuntimeError, r"that of 0\.weight .*or a hook")


# --- what has a graph, or needs none ----------------------------------------------------------------------------------


def test_constant_gradients_are_named_in_one_warning():
    p, q = param(3), param(3)
    opt = AdaHessian([("curved", p), ("straight", q)], lr=1e-4, eps=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            opt.zero_grad()
            (p**2 + q).sum().backward(create_graph=True)
            opt.step()
    said = [str(w.message) for w in caught if "constant" in str(w.message)]
    assert len(said) == 1 and "the gradient of straight is constant" in said[0]
    assert not opt.state[q]["exp_hessian_diag_sq"].any() and opt.state[p]["exp_hessian_diag_sq"].all()


def test_a_loss_that_is_linear_in_everything_steps_by_the_gradient_over_eps():
    p, slope = param(3), torch.randn(3)
    start = p.detach().clone()
    opt = AdaHessian([("p", p)], lr=1e-4, eps=1e-2)
    with pytest.warns(UserWarning, match="the gradient of p is constant"):
        (slope * p).sum().backward(create_graph=True)
        opt.step()
    torch.testing.assert_close(p.detach(), start - 1e-2 * slope)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("zero", ["optimizer", "model"])
def test_an_abandoned_backward_pass_without_a_graph_is_forgotten_with_its_gradients(zero, set_to_none):
    net, (x, y) = small_net(), (t.float() for t in small_data())
    opt = AdaHessian(net.named_parameters(), lr=0.05)
    F.mse_loss(net(x), y).backward()  # to look at the norm of the gradients, say
    (opt if zero == "optimizer" else net).zero_grad(set_to_none=set_to_none)
    F.mse_loss(net(x), y).backward(create_graph=True)
    opt.step()
    other = small_net()
    exact = AdaHessian(other.named_parameters(), lr=0.05)
    F.mse_loss(other(x), y).backward(create_graph=True)
    exact.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_parameters_that_a_batch_does_not_use_have_gradients_of_zero():
    p, q = param(3), param(3)
    opt = AdaHessian([("p", p), ("q", q)], lr=0.05)
    for t in range(3):
        opt.zero_grad(set_to_none=False)
        ((p**4).sum() + (q**4).sum() * (t != 1)).backward(create_graph=True) if t != 1 else (p**4).sum().backward(
            create_graph=True
        )
        before = q.detach().clone()
        opt.step()
        assert opt.state[q]["step"] == t + 1 and not torch.equal(q, before)
    assert opt.state[p]["hessian_step"] == 3


def test_an_abandoned_gradient_of_a_parameter_that_the_next_batch_does_not_use_is_forgotten():
    p, q = param(3), param(3)
    opt = AdaHessian([("p", p), ("q", q)])
    (p**4 + q**4).sum().backward()
    opt.zero_grad(set_to_none=False)
    (p**4).sum().backward(create_graph=True)
    opt.step()
    assert opt.state[p]["exp_hessian_diag_sq"].all() and not opt.state[q]["exp_hessian_diag_sq"].any()


def test_constant_parts_of_a_gradient_change_nothing_about_its_graph():
    p, slope = param(3), torch.randn(3)
    opt = AdaHessian([("p", p)], betas=(0.9, 0.0))
    for loss in (slope * p, p**4, slope * p, p**4, slope * p):
        loss.sum().backward(create_graph=True)
    expected = 2 * 12 * p.detach() ** 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    torch.testing.assert_close(opt.state[p]["exp_hessian_diag_sq"].sqrt(), expected)


def test_asking_for_gradients_with_autograd_grad_changes_no_note():
    net, (x, y) = small_net(), (t.float() for t in small_data())
    opt = AdaHessian(net.named_parameters())
    F.mse_loss(net(x), y).backward(create_graph=True)
    torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    opt.step()
    assert all(opt.state[p]["exp_hessian_diag_sq"].any() for p in net.parameters())


def test_steps_that_estimate_nothing_need_no_graph():
    net, (x, y) = Net(), (t.float() for t in (torch.randn(8, 3), torch.randn(8, 1)))
    opt = AdaHessian(net.named_parameters(), update_period=2)
    net.options = False
    for _ in range(2):
        opt.zero_grad()
        F.mse_loss(net(x), y).backward(create_graph=opt.needs_graph())
        net.options = True  # in the second of two steps
        opt.step()
    assert opt.state[net.first.weight]["step"] == 2


@pytest.mark.parametrize("travel", [through_pickle, through_deepcopy])
def test_copies_watch_their_own_parameters(travel):
    params = [param(3), param(3)]
    opt = AdaHessian([("curved", params[0]), ("straight", params[1])], lr=1e-4)
    opt, (p, q) = travel(opt, params)
    with pytest.warns(UserWarning, match="the gradient of straight is constant"):
        (p**2 + q).sum().backward(create_graph=True)
        opt.step()  # that the second gradient is constant was seen by a hook
    opt.zero_grad()
    (p**2 + q**2).sum().backward()
    assert_refused(opt, [p, q], RuntimeError, r"that of curved .*create_graph=True\), in each")


def test_parameters_that_are_added_unfrozen_or_moved_are_watched():
    added, frozen_one, moved = param(3), param(3).requires_grad_(False), param(3)
    opt = AdaHessian([("moved", moved), ("frozen", frozen_one)], lr=1e-4)
    opt.add_param_group({"params": [("added", added)]})
    frozen_one.requires_grad_(True)
    moved.data = moved.data.double()  # PyTorch makes a new node for it
    for way in (opt.zero_grad, opt.needs_graph):
        way()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (moved.float() + added + frozen_one).sum().backward(create_graph=True)
            opt.step()
        assert opt.state[added]["step"] and not opt.state[moved]["exp_hessian_diag_sq"].any()
        assert len([w for w in caught if "moved, frozen, added is constant" in str(w.message)]) == (
            way == opt.zero_grad
        )
        for p in (moved, added, frozen_one):
            p.grad = None


def test_bucket_views_of_distributed_data_parallel_keep_the_graph(tmp_path):
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, other, (x, y) = small_net(), small_net(), (t.float() for t in small_data())
        wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True)
        opt, exact = (AdaHessian(m.named_parameters(), lr=0.05) for m in (net, other))
        for _ in range(3):
            opt.zero_grad(), exact.zero_grad()
            with wrapped.no_sync():
                F.mse_loss(wrapped(x), y).backward(create_graph=True)
            F.mse_loss(other(x), y).backward(create_graph=True)
            opt.step(), exact.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    finally:
        dist.destroy_process_group()


def test_watching_keeps_neither_graphs_nor_optimizers_alive():
    gc.collect()
    gc.disable()
    try:
        net, (x, y) = small_net(), (t.float() for t in small_data())
        opt = AdaHessian(net.named_parameters())
        loss = F.mse_loss(net(x), y)
        held = weakref.ref(loss)
        loss.backward(create_graph=True)
        del loss
        opt.step()
        assert held() is None
        notes = weakref.ref(opt.watch())
        del opt
        assert notes() is None
        F.mse_loss(net(x), y).backward()  # and the hooks that are left do nothing
    finally:
        gc.enable()


# --- what else makes the second backward pass fail --------------------------------------------------------------------


def body_and_head(first, last):
    "A model of which two optimizers have a part each, and a loss."
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return net, first(net[0]), last(net[2]), net(torch.randn(8, 3)).square().mean()


OTHERS = {
    "SGDSaI": lambda layer: SGDSaI(layer.parameters()),
    "SGDSaI, fused": lambda layer: SGDSaI(layer.parameters(), fused=True),
    "Adan": lambda layer: Adan(layer.parameters()),
    "AdamW": lambda layer: torch.optim.AdamW(layer.parameters()),
    "AdamW, fused": lambda layer: torch.optim.AdamW(layer.parameters(), fused=True),
    "SGD": lambda layer: torch.optim.SGD(layer.parameters(), lr=0.1),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_an_optimizer_that_steps_before_adahessian_is_told_to_step_after_it(other):
    net, opt, head, loss = body_and_head(lambda layer: AdaHessian(layer.named_parameters()), other)
    loss.backward(create_graph=True)
    head.step()
    said = f"by {type(head).__name__}: let AdaHessian step first, and the other optimizers"
    assert_refused(opt, list(net[0].parameters()), RuntimeError, said)
    net, opt, head, loss = body_and_head(lambda layer: AdaHessian(layer.named_parameters()), other)
    loss.backward(create_graph=True)
    opt.step()
    head.step()
    assert opt.state[net[0].weight]["exp_hessian_diag_sq"].any()


def test_an_optimizer_of_other_parameters_may_step_whenever_it_likes():
    net, other, x = nn.Linear(3, 1), nn.Linear(3, 1), torch.randn(8, 3)
    opt, free = AdaHessian(net.named_parameters()), torch.optim.AdamW(other.parameters(), fused=True)
    other(x).square().mean().backward()
    net(x).square().mean().backward(create_graph=True)
    free.step()
    opt.step()
    net, opt, head, loss = body_and_head(lambda layer: AdaHessian(layer.named_parameters()), OTHERS["AdamW, fused"])
    loss.backward(create_graph=True)
    head.zero_grad()
    head.step()  # changes nothing
    opt.step()
    assert not _global_optimizer_post_hooks  # nobody is watched after the step


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_of_another_optimizer_is_forgotten_with_the_gradients_before_it(set_to_none):
    net, opt, head, loss = body_and_head(lambda layer: AdaHessian(layer.named_parameters()), OTHERS["AdamW, fused"])
    loss.backward(create_graph=True)  # of two networks that train each other, the turn of the other one
    head.step()
    net.zero_grad(set_to_none=set_to_none)
    net(torch.randn(8, 3)).square().mean().backward(create_graph=True)
    opt.step()
    assert opt.state[net[0].weight]["exp_hessian_diag_sq"].any()


def test_weights_that_are_changed_by_hand_before_the_step_are_refused():
    net, opt, _, loss = body_and_head(lambda layer: AdaHessian(layer.named_parameters()), lambda layer: None)
    loss.backward(create_graph=True)
    with torch.no_grad():
        net[2].weight.lerp_(torch.zeros(1, 4), 0.1)
    assert_refused(opt, list(net[0].parameters()), RuntimeError, "let AdaHessian step first")


def test_compiled_models_are_told_that_they_have_no_second_derivative():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    opt = AdaHessian(net.named_parameters())
    torch.compile(net, backend="aot_eager")(torch.randn(8, 3)).square().mean().backward(create_graph=True)
    before = everything(opt, list(net.parameters()))
    with pytest.raises(RuntimeError, match=r"a compiled model has no second derivative.*without torch\.compile"):
        opt.step()
    assert same(everything(opt, list(net.parameters())), before)


def test_the_estimator_alone_says_what_is_wrong_with_a_reentrant_checkpoint():
    net = Net()
    (net(torch.randn(8, 3)).square().mean() + net.first.weight.square().sum()).backward(create_graph=True)
    params = [net.first.weight, net.last.weight]
    with pytest.raises(RuntimeError, match=REENTRANT):
        hutchinson_diagonal([p.grad for p in params], params)


# --- states that do not fit -------------------------------------------------------------------------------------------


def trained(*shape, **options):
    "A parameter and its optimizer after a step."
    p = param(*shape)
    opt = AdaHessian([("p", p)], **options)
    (p**4).sum().backward(create_graph=True)
    opt.step()
    return p, opt


SHAPES = {
    "grown": ((6, 4), (9, 4)),
    "shrunk": ((6, 4), (3, 4)),
    "as many entries": ((6, 4), (4, 6)),
    "a dimension more": ((6, 4), (6, 4, 1)),
    "other channels": ((4, 3, 3, 3), (5, 3, 3, 3)),
    "another window": ((4, 3, 3, 3), (4, 3, 5, 5)),
}


@pytest.mark.parametrize("old, new", SHAPES.values(), ids=SHAPES)
def test_a_state_of_another_shape_is_not_loaded(old, new):
    saved = copy.deepcopy(trained(*old)[1].state_dict())
    p, opt = trained(*new)
    before = everything(opt, [p])
    with pytest.raises(ValueError, match=r"state of p .*exp_avg has the shape") as refused:
        opt.load_state_dict(saved)
    assert str(old) in str(refused.value) and str(new) in str(refused.value) and same(everything(opt, [p]), before)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 3, 5, 5), (4, 3), (4, 3, 3)], ids=str)
def test_a_curvature_of_another_shape_is_not_loaded(shape):
    p, opt = trained(4, 3, 3, 3)
    saved, before = copy.deepcopy(opt.state_dict()), everything(opt, [p])
    saved["state"][0]["exp_hessian_diag_sq"] = torch.ones(shape)  # that of other windows is not averaged over them
    with pytest.raises(ValueError, match=r"state of p .*exp_hessian_diag_sq has the shape"):
        opt.load_state_dict(saved)
    assert same(everything(opt, [p]), before)
    saved["state"][0]["exp_hessian_diag_sq"] = torch.ones(4, 3, 3, 3)  # that of the released code
    opt.load_state_dict(saved)
    assert torch.equal(opt.state[p]["exp_hessian_diag_sq"], torch.ones(4, 3, 1, 1))


def test_averaged_windows_are_not_loaded_where_none_are_averaged():
    saved = copy.deepcopy(trained(4, 3, 3, 3)[1].state_dict())
    saved["param_groups"][0]["average_window"] = False
    p, opt = trained(4, 3, 3, 3, average_window=False)
    with pytest.raises(ValueError, match=r"exp_hessian_diag_sq has the shape \(4, 3, 1, 1\)"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_hessian_diag_sq"])
def test_a_state_in_which_something_is_missing_is_not_loaded(key):
    p, opt = trained(6, 4)
    saved, before = copy.deepcopy(opt.state_dict()), everything(opt, [p])
    saved["state"][0].pop(key)
    with pytest.raises(ValueError, match=rf"state of p cannot be loaded: {key} (is|are) missing"):
        opt.load_state_dict(saved)
    assert same(everything(opt, [p]), before)


@pytest.mark.parametrize("old, new", SHAPES.values(), ids=SHAPES)
def test_a_parameter_whose_shape_has_changed_does_not_step(old, new):
    p, opt = trained(*old)
    other, _ = trained(2)
    opt.add_param_group({"params": [("other", other)]})
    p.grad, p.data = None, torch.randn(new)
    (sum((q**4).sum() for q in (p, other))).backward(create_graph=True)
    assert_refused(
        opt, [p, other], RuntimeError, r"state of p does not fit: exp_avg has the shape .*Nothing was changed"
    )
    del opt.state[p]
    opt.zero_grad()
    (sum((q**4).sum() for q in (p, other))).backward(create_graph=True)
    opt.step()
    assert opt.state[p]["step"] == 1 and opt.state[other]["step"] == 1


def test_a_gradient_of_another_shape_does_not_step():
    p, q = param(6, 4), param(3)
    opt = AdaHessian([("q", q), ("p", p)])
    (p**4).sum().add((q**4).sum()).backward(create_graph=True)
    p.data = torch.randn(9, 4)
    assert_refused(opt, [q, p], RuntimeError, r"of p does not fit: its gradient has the shape \(6, 4\)")


# --- another default device, another default dtype --------------------------------------------------------------------


def straight_run(done=2):
    "Parameters and states after four steps with each kind of option, with a copy and a load on the way."
    net = small_net().float().cpu()
    net.requires_grad_(True)
    opt = AdaHessian(
        [
            dict(params=list(net[0].parameters()), state_dtype=torch.bfloat16),
            dict(params=list(net[3].parameters()), block_size=3, n_samples=2),
            dict(params=list(net[5].parameters()), update_period=2, signed_average=True),
        ],
        lr=0.05,
    )
    x, y = (t.to("cpu", torch.float32) for t in small_data())
    return net, opt, x, y


def go_on(net, opt, x, y):
    for t in range(4):
        opt.zero_grad()
        F.mse_loss(net(x), y).backward(create_graph=opt.needs_graph())
        opt.step()
        if t == 1:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        if t == 2:
            opt, net = pickle.loads(pickle.dumps((opt, net)))
    return [p.detach() for p in net.parameters()], [dict(opt.state[p]) for p in net.parameters()]


def test_another_default_device_makes_no_difference():
    expected = go_on(*straight_run())
    start = straight_run()
    with torch.device("meta"):
        found = go_on(*start)
    assert_same_run(found, expected, rtol=0, atol=0)
    torch.set_default_device("meta")
    try:
        found = go_on(*start[:0], *copy.deepcopy(straight_run_on_cpu()))
    finally:
        torch.set_default_device(None)
    assert_same_run(found, expected, rtol=0, atol=0)


def straight_run_on_cpu():
    with torch.device("cpu"):
        return straight_run()


def test_another_default_dtype_makes_no_difference():
    expected, start = go_on(*straight_run()), straight_run()
    torch.set_default_dtype(torch.float64)
    try:
        params, states = go_on(*start)
    finally:
        torch.set_default_dtype(torch.float32)
    for state in states:  # PyTorch keeps step counts in the default dtype
        state.update({key: state[key].float() for key in ("step", "hessian_step")})
    assert_same_run((params, states), expected, rtol=0, atol=0)
