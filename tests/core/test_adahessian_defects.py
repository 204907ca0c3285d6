"The other defects of the released code of AdaHessian that must not be inherited, one test each or more."

import gc
import os
import weakref

import psutil
import pytest
import torch
import torch.nn.functional as F
from adahessian_shared import (
    Released,
    assert_same_run,
    coming_signs,
    one_step,
    plain_windows,
    products,
    small_data,
    small_net,
    uneven,
)
from common import (
    param,
    twin,
)
from torch import nn

import sgd_sai.adahessian
from sgd_sai.adahessian import AdaHessian

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]


def test_defect_three_and_five_dimensional_tensors_break():
    for shape in ((4, 3, 5), (2, 3, 2, 2, 2)):
        theirs, p = param(*shape), param(*shape)
        theirs.grad = torch.ones(shape)
        with pytest.raises(
            KeyError
        ):  # no case for them: the released code has the last tensor's estimate here, or none
            Released([theirs]).step({theirs: torch.ones(shape)})
        opt = AdaHessian([p], lr=1, betas=(0, 0), eps=0)
        uneven([p]).backward(create_graph=True)
        z = coming_signs(opt)[0]
        g, D = p.grad.detach().double(), plain_windows((z[p] * products(z)[p]).abs())
        before = p.detach().double()
        opt.step()
        torch.testing.assert_close(p.detach(), (before - g / D).float(), rtol=1e-5, atol=1e-6)


def test_defect_parameter_that_enters_linearly_raises():
    curved, linear, other = param(4, 3), param(5), param(2)
    slope = torch.randn(5)

    theirs = [twin(p) for p in (curved, linear)]
    theirs[0].grad, theirs[1].grad = torch.ones(4, 3), slope
    with pytest.raises(RuntimeError, match="does not have a grad_fn"):
        Released(theirs).step({theirs[0]: torch.ones(4, 3)})

    ours = [twin(p) for p in (curved, linear, other)]
    opt = AdaHessian(ours, lr=1e-4, eps=1e-2)
    (ours[0].square().sum() + (slope * ours[1]).sum() + ours[2].square().sum() * 0).backward(create_graph=True)
    assert not ours[1].grad.requires_grad and ours[2].grad.requires_grad  # without a graph; with a graph that says zero
    opt.step()
    torch.testing.assert_close(ours[1].detach(), linear.detach() - 1e-4 * slope / 1e-2)  # curvature zero
    torch.testing.assert_close(ours[0].detach(), curved.detach() * (1 - 1e-4 * 2 / 2.01))
    assert torch.equal(ours[2], other) and not opt.state[ours[1]]["exp_hessian_diag_sq"].any()
    # bilinear: each gradient has a graph that does not lead back to its own parameter
    a, b = param(3), param(3)
    opt = AdaHessian([a, b], lr=1e-4, eps=1e-2)
    (a.detach() * b).sum().backward(create_graph=True)
    a.grad = (b * 2.0).requires_grad_()
    before = a.detach().clone(), b.detach().clone()
    opt.step()
    torch.testing.assert_close(a.detach(), before[0] - 1e-2 * 2 * before[1])


def test_defect_storage_is_made_anew_in_every_step():
    theirs = param(4, 3)
    theirs.grad, address = torch.ones(4, 3), theirs.data_ptr()
    Released([theirs]).step({theirs: torch.ones(4, 3)})
    assert theirs.data_ptr() != address

    net = small_net()
    opt = AdaHessian(net.parameters(), weight_decay=0.1, update_period=2)
    x, y = (t.float() for t in small_data())
    kept = None
    for _ in range(5):
        opt.zero_grad()
        F.mse_loss(net(x), y).backward(create_graph=True)
        versions = [p._version for p in net.parameters()]
        opt.step()
        tensors = [p for p in net.parameters()] + [value for p in net.parameters() for value in opt.state[p].values()]
        addresses = [t.data_ptr() for t in tensors]
        assert kept is None or (kept[0] == addresses and all(a is b for a, b in zip(kept[1], tensors, strict=True)))
        kept = addresses, tensors
        assert all(
            p._version > v for p, v in zip(net.parameters(), versions, strict=True)
        )  # changed where autograd can see it, so a graph from before the step is refused


def left_alive(outcome="ordinary", n=5):
    "How many of n models live on after a step or two, when nothing but reference counts frees them."
    x, y = (t.float() for t in small_data())
    left = []
    for _ in range(n):
        net = small_net()
        opt = AdaHessian(net.parameters(), update_period=2 if outcome == "not due" else 1)
        for _ in range(2 if outcome == "not due" else 1):
            one_step(net, opt, x, y, outcome)
        left.append(weakref.ref(net[0].weight))
        del net, opt
    return [ref() for ref in left if ref() is not None]


@pytest.mark.parametrize("outcome", ["ordinary", "not due", "not finite", "skipped by a GradScaler"])
def test_defect_reference_cycle_keeps_models_alive(outcome, monkeypatch):
    gc.collect()
    gc.disable()
    try:
        assert not left_alive(outcome)
        monkeypatch.setattr(sgd_sai.adahessian, "drop_graphs", lambda opt: None)
        alive = left_alive(outcome)  # so what is tested above is the work of that function
        assert len(alive) == 5
        for p in alive:
            p.grad = None
    finally:
        gc.enable()


def test_defect_reference_cycle_memory_is_flat_over_a_thousand_steps():
    net, process = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)), psutil.Process(os.getpid())
    opt, x = AdaHessian(net.parameters(), lr=1e-3, update_period=2), torch.randn(64, 64)

    def run(n):
        for _ in range(n):
            opt.zero_grad(set_to_none=False)
            net(x).square().mean().backward(create_graph=True)  # whether it is due or not
            opt.step()
            assert not any(p.grad.requires_grad for p in net.parameters())

    run(200)
    before = process.memory_info().rss
    run(1000)
    assert process.memory_info().rss - before < 4e6  # the graph of a step is 100 kB


def accumulated(parts, **options):
    "Parameters and states after three steps, each from a batch in so many parts."
    net = small_net().double()
    opt = AdaHessian(net.parameters(), lr=0.05, **options)
    for _ in range(3):
        opt.zero_grad()
        for x, y in zip(*(t.chunk(parts) for t in small_data()), strict=True):
            (F.mse_loss(net(x), y) / parts).backward(create_graph=True)
        opt.step()
    return [p.detach() for p in net.parameters()], [opt.state[p] for p in net.parameters()]


@pytest.mark.parametrize("options", [{}, dict(update_period=2), dict(n_samples=2, signed_average=True)], ids=str)
def test_defect_gradient_accumulation_inflates_the_estimate(options):
    whole = accumulated(1, **options)
    for parts in (2, 4, 8):
        assert_same_run(accumulated(parts, **options), whole, rtol=1e-9, atol=1e-12)

    net = small_net().double()  # a sum of absolute values would be larger, so the test above can tell
    opt = AdaHessian(net.parameters())
    estimates = []
    for x, y in [small_data(), *zip(*(t.chunk(8) for t in small_data()), strict=True)]:
        opt.zero_grad()
        F.mse_loss(net(x), y).backward(create_graph=True)
        estimates.append(torch.cat([h.abs().flatten() for h in products(coming_signs(opt)[0]).values()]))
    assert sum(estimates[1:]).div(8).sum() > 1.2 * estimates[0].sum()
