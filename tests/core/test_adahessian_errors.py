"What AdaHessian refuses, before anything changes; GradScaler, and clipping."

import contextlib

import pytest
import torch
import torch.nn.functional as F
from adahessian_shared import (
    assert_refused,
    assert_same_run,
    everything,
    one_step,
    same,
    small_data,
    small_net,
)
from common import (
    param,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

from sgd_sai.adahessian import AdaHessian

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]


@pytest.mark.parametrize("done", [0, 1, 2])
def test_error_without_create_graph_changes_nothing(done):
    net = small_net()
    params, (x, y) = list(net.parameters()), (t.float() for t in small_data())
    opt = AdaHessian(
        [
            {"params": list(net[0].named_parameters(prefix="0"))},
            {"params": list(net[3:].named_parameters(prefix="head")), "update_period": 3},
        ]
    )
    for _ in range(done):
        one_step(net, opt, x, y, "ordinary")
    opt.zero_grad()
    F.mse_loss(net(x), y).backward()
    grads = [p.grad for p in params]
    assert_refused(
        opt,
        params,
        RuntimeError,
        r"AdaHessian needs the graph.*0\.weight for instance: call loss\.backward\(create_graph=True\)",
    )
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    one_step(net, opt, x, y, "ordinary")  # and goes on


def test_one_gradient_with_a_graph_is_enough():
    # with create_graph=True at least one parameter has a graph, maybe in another group; the others are linear
    p, q = param(3), param(3)
    opt = AdaHessian([{"params": [p], "update_period": 5}, {"params": [q]}], lr=1e-4, eps=1e-2)
    for _ in range(2):
        opt.zero_grad()
        (p.square().sum() + q.sum()).backward(create_graph=True)
        opt.step()
    assert (
        opt.state[q]["hessian_step"] == 2
        and opt.state[p]["hessian_step"] == 1
        and not opt.state[q]["exp_hessian_diag_sq"].any()
    )


def test_sparse_gradients_are_refused_by_name():
    table, head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    params = [*head.parameters(), table.weight]
    opt = AdaHessian([{"params": list(head.named_parameters(prefix="head"))}, {"params": [("table", table.weight)]}])
    head(table(torch.tensor([1, 1, 3]))).square().sum().backward(create_graph=True)
    assert_refused(
        opt,
        params,
        RuntimeError,
        "AdaHessian does not support sparse gradients, which parameter table has: build its layer with sparse=False",
    )


def kink(p):
    "A loss with gradient zero and an infinite second derivative."
    return (p - p.detach()).pow(1.5).sum()


@pytest.mark.parametrize("done", [0, 1])
@pytest.mark.parametrize("bad", ["inf", "nan"])
def test_curvature_that_is_not_finite_is_refused_by_name(done, bad):
    net = small_net()
    params, (x, y) = list(net.parameters()), (t.float() for t in small_data())
    opt = AdaHessian(net.named_parameters())
    for _ in range(done):
        one_step(net, opt, x, y, "ordinary")
    opt.zero_grad()
    (
        F.mse_loss(net(x), y)
        + kink(net[3].bias)
        + (kink(net[5].bias) if bad == "inf" else (kink(net[5].bias) - kink(net[5].bias)))
    ).backward(create_graph=True)
    assert all(p.grad.isfinite().all() for p in params)
    assert_refused(opt, params, FloatingPointError, r"curvature of 3\.bias, 5\.bias is not finite; nothing was changed")
    one_step(net, opt, x, y, "ordinary")


def test_complex_parameters_are_refused_by_name():
    p, q = param(3), nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match="AdaHessian does not support complex parameters, such as wave: use torch.view_as_real"
    ):
        AdaHessian([("weight", p), ("wave", q)])
    opt = AdaHessian([p])
    with pytest.raises(ValueError, match=r"#0 of group 1, shape \(2,\)"):
        opt.add_param_group({"params": [q]})
    assert len(opt.param_groups) == 1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.inner(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.outer(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_fused_attention_is_refused_with_the_way_out_and_works_on_it():
    model, x = Attention(), torch.randn(2, 5, 8)
    params, opt = list(model.parameters()), AdaHessian(model.named_parameters())
    model(x).square().sum().backward(create_graph=True)
    assert_refused(
        opt,
        params,
        RuntimeError,
        r"no second derivative.*attention.*torch\.nn\.attention\.sdpa_kernel\(torch\.nn\.attention\.SDPBackend\.MATH\)",
    )
    for _ in range(2):
        opt.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(x).square().sum()
        loss.backward(create_graph=True)
        opt.step()
    assert all(opt.state[p]["step"] == 2 for p in params)


def test_other_errors_of_the_second_backward_pass_are_passed_on():
    p = param(3)
    opt = AdaHessian([p])
    loss = p.pow(3).sum()
    loss.backward(create_graph=True)
    torch.autograd.grad(p.grad.sum(), p)  # frees what the step needs
    assert_refused(opt, [p], RuntimeError, "backward through the graph a second time")


def scaled_run(scaler, n=4, **options):
    net = small_net()
    opt, (x, y) = AdaHessian(net.parameters(), lr=0.05, **options), (t.float() for t in small_data())
    for _ in range(n):
        opt.zero_grad()
        loss = F.mse_loss(net(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward(create_graph=opt.needs_graph())
        opt.step() if scaler is None else scaler.step(opt)
        if scaler is not None:
            scaler.update()
    return [p.detach() for p in net.parameters()], [opt.state[p] for p in net.parameters()]


@pytest.mark.parametrize("options", [{}, dict(update_period=2, n_samples=2)], ids=str)
def test_grad_scaler_makes_no_difference(options):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    assert_same_run(scaled_run(scaler, **options), scaled_run(None, **options), rtol=1e-6, atol=0)
    assert scaler.get_scale() == 2.0**10  # it has grown in between
    assert_same_run(
        scaled_run(torch.amp.GradScaler("cpu", enabled=False), **options), scaled_run(None, **options), rtol=0, atol=0
    )


@pytest.mark.parametrize("poison", ["gradient", "curvature", "both"])
def test_grad_scaler_skips_what_is_not_finite(poison):
    net, scaler = small_net(), torch.amp.GradScaler("cpu", init_scale=4.0)
    params, opt, (x, y) = list(net.parameters()), AdaHessian(net.parameters()), (t.float() for t in small_data())
    for bad in (False, True, False):
        opt.zero_grad()
        loss = F.mse_loss(net(x), y)
        with_poison = {
            "gradient": loss + (torch.inf * net[5].bias).sum(),
            "curvature": loss + kink(net[5].bias),
            "both": loss * torch.inf,
        }[poison]
        scaler.scale(with_poison if bad else loss).backward(create_graph=True)
        before, scale = everything(opt, params), scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        assert not any(p.grad.requires_grad for p in params)
        assert same(everything(opt, params), before) == bad
        if poison != "curvature":  # the scaler looks at gradients alone
            assert scaler.get_scale() == (scale / 2 if bad else scale)
    assert all(opt.state[p]["step"] == 2 for p in params) and opt.param_groups[0]["draws"] == 2


def test_grad_scaler_unscale_is_refused():
    net, scaler = small_net(), torch.amp.GradScaler("cpu", init_scale=4.0)
    params, opt, (x, y) = list(net.parameters()), AdaHessian(net.parameters()), (t.float() for t in small_data())
    scaler.scale(F.mse_loss(net(x), y)).backward(create_graph=True)
    scaler.unscale_(opt)
    assert_refused(
        opt,
        params,
        RuntimeError,
        r"cannot go on after scaler\.unscale_\(optimizer\).*bfloat16",
        step=lambda: scaler.step(opt),
    )


@pytest.mark.parametrize("mistake", ["unscale_", "no graph"])
def test_grad_scaler_goes_on_after_a_refusal(mistake):
    net, scaler = small_net(), torch.amp.GradScaler("cpu", init_scale=4.0)
    opt, (x, y) = AdaHessian(net.parameters(), lr=0.05), (t.float() for t in small_data())
    scaler.scale(F.mse_loss(net(x), y)).backward(create_graph=mistake != "no graph")
    if mistake == "unscale_":
        scaler.unscale_(opt)
    with contextlib.suppress(RuntimeError):
        scaler.step(opt)
        raise AssertionError("an error was expected")
    scaler.update()
    opt.zero_grad()
    scaler.scale(F.mse_loss(net(x), y)).backward(create_graph=True)
    scaler.step(opt)  # PyTorch hands the scale over in attributes of the optimizer, and multiplies what it finds there
    assert_same_run(
        ([p.detach() for p in net.parameters()], [opt.state[p] for p in net.parameters()]),
        scaled_run(None, n=1),
        rtol=1e-6,
        atol=0,
    )


def test_clipping_between_backward_and_step_leaves_the_curvature_unclipped():
    x, y = (t.float() for t in small_data())
    nets = [small_net() for _ in range(2)]
    opts = [AdaHessian(net.parameters(), lr=0.05, eps=0.1) for net in nets]
    for net, opt, clip in zip(nets, opts, (False, True), strict=True):
        F.mse_loss(net(x), y).backward(create_graph=True)
        norm = torch.stack([p.grad.detach().norm() for p in net.parameters()]).norm()
        if clip:
            clip_grad_norm_(net.parameters(), norm.item() / 4)
        opt.step()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(opts[0].state[p]["exp_hessian_diag_sq"], opts[1].state[q]["exp_hessian_diag_sq"])
        torch.testing.assert_close(opts[0].state[p]["exp_avg"] / 4, opts[1].state[q]["exp_avg"], rtol=1e-4, atol=1e-9)
