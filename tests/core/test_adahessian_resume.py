"AdaHessian over time: parameters that come and go, step counts and counts of estimates, runs that stop and resume."

import copy

import pytest
import torch
import torch.nn.functional as F
from adahessian_shared import assert_same_run, everything, one_step, same, small_data, small_net
from common import (
    each_travel,
    param,
    through_deepcopy,
    through_pickle,
    through_state_dict,
)
from torch import nn

import sgd_sai.adahessian
from sgd_sai.adahessian import AdaHessian

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]


@pytest.mark.parametrize("options", [{}, dict(update_period=3)], ids=str)
def test_frozen_parameters_and_parameters_unfrozen_later(options):
    x, y = (t.float() for t in small_data())
    net = small_net()
    opt = AdaHessian(
        [{"params": net[0].parameters()}, {"params": net[3].parameters()}, {"params": net[5].parameters()}],
        lr=0.05,
        **options,
    )
    net[3].requires_grad_(False)
    kept = [p.detach().clone() for p in net[3].parameters()]
    period = options.get("update_period", 1)
    for t in range(7):
        if t == 4:
            net[3].requires_grad_(True)
            assert all(torch.equal(p, q) for p, q in zip(net[3].parameters(), kept, strict=True)) and not any(
                opt.state.get(p) for p in net[3].parameters()
            )
        if t == 5:
            net[0].requires_grad_(False)
            still = copy.deepcopy(
                ([p.detach() for p in net[0].parameters()], [dict(opt.state[p]) for p in net[0].parameters()])
            )
        opt.zero_grad()
        F.mse_loss(net(x), y).backward(create_graph=opt.needs_graph())
        opt.step()
    assert same(([p.detach() for p in net[0].parameters()], [dict(opt.state[p]) for p in net[0].parameters()]), still)
    # unfrozen at step 4: its curvature is estimated when the next estimate is due, and till then it waits
    first = 4 if period == 1 else 6
    for layer, start, end in ((net[0], 0, 5), (net[3], first, 7), (net[5], 0, 7)):
        for p in layer.parameters():
            assert opt.state[p]["step"] == end - start and opt.state[p]["hessian_step"] == len(
                [t for t in range(start, end) if t % period == 0]
            )
            assert opt.state[p]["exp_hessian_diag_sq"].any()


def test_parameter_without_a_gradient_keeps_state_and_step_count():
    p, q = param(3), param(3)
    opt = AdaHessian([p, q], lr=0.05)
    for t in range(4):
        opt.zero_grad()
        (p.pow(4).sum() + (q.pow(4).sum() if t != 2 else 0)).backward(create_graph=True)
        before = everything(opt, [q])
        opt.step()
        if t == 2:
            after = everything(opt, [q])
            assert same(after[:3], before[:3])
    assert opt.state[p]["step"] == 4 and opt.state[q]["step"] == 3
    opt.zero_grad()
    opt.step()  # no gradients at all is no error
    assert opt.state[p]["step"] == 4


def test_needs_graph_and_the_counts_of_an_update_period():
    net = small_net()
    opt = AdaHessian(
        [{"params": net[0].parameters(), "update_period": 2}, {"params": net[3].parameters(), "update_period": 3}],
        lr=0.05,
    )
    always = small_net()
    other = AdaHessian(
        [
            {"params": always[0].parameters(), "update_period": 2},
            {"params": always[3].parameters(), "update_period": 3},
        ],
        lr=0.05,
    )
    x, y = (t.float() for t in small_data())
    needed = []
    for t in range(7):
        needed.append(opt.needs_graph())
        opt.zero_grad(), other.zero_grad()
        F.mse_loss(net(x), y).backward(create_graph=opt.needs_graph())
        F.mse_loss(always(x), y).backward(create_graph=True)
        kept = (
            {p: opt.state[p]["exp_hessian_diag_sq"].clone() for p in [*net[0].parameters(), *net[3].parameters()]}
            if t
            else {}
        )
        opt.step(), other.step()
        for layer, period in ((net[0], 2), (net[3], 3)):
            for p in layer.parameters():
                assert opt.state[p]["step"] == t + 1 and opt.state[p]["hessian_step"] == t // period + 1
                assert t == 0 or torch.equal(opt.state[p]["exp_hessian_diag_sq"], kept[p]) == (t % period != 0)
    assert needed == [True, False, True, True, True, False, True]
    assert [(group["age"], group["draws"]) for group in opt.param_groups] == [(1, 4), (1, 3)]
    assert all(
        torch.equal(p, q) for p, q in zip(net.parameters(), always.parameters(), strict=True)
    )  # a graph that is not needed makes no difference


def test_average_is_debiased_by_the_number_of_estimates():
    p = nn.Parameter(torch.ones(3))
    opt = AdaHessian([p], lr=0.0, betas=(0.0, 0.9), update_period=3)
    for _ in range(8):  # estimates in steps 1, 4 and 7
        opt.zero_grad()
        (p.square() * 5).sum().backward(create_graph=True)
        opt.step()
    torch.testing.assert_close(opt.state[p]["exp_hessian_diag_sq"], torch.full((3,), 100 * (1 - 0.9**3)))
    opt.param_groups[0]["lr"] = 1.0
    opt.zero_grad()
    (p.square() * 5).sum().backward()
    opt.step()
    assert p.abs().max() < 1e-4  # Newton's step, so the average was debiased with 3 and not with 9


def path(n=6, done=None, travel=None, dtype=torch.float32, **options):
    "Parameters and states after n steps; after `done` of them optimizer and parameters travel."
    params = [param(*shape, dtype=dtype) for shape in ((), (5,), (4, 3), (3, 2, 2, 2))]
    opt = AdaHessian(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "weight_decay": 0.1}], lr=0.05, **options
    )
    for t in range(n):
        if t == done:
            opt.zero_grad()
            opt, params = travel(opt, params)
        opt.zero_grad()
        generator = torch.Generator().manual_seed(t)
        flat = torch.cat([p.flatten() for p in params])
        noise = torch.randn(flat.shape, generator=generator).to(dtype)
        (
            flat**4 / 4 + flat**2 * noise.abs() + (flat.sum() ** 2 + (flat * flat.roll(1) * noise).sum()) / 20
        ).sum().backward(create_graph=opt.needs_graph())
        opt.step()
    return [p.detach() for p in params], [dict(opt.state[p]) for p in params]


@pytest.mark.parametrize(
    "dtype, kw", [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, dict(state_dtype=torch.float32))], ids=str
)
@pytest.mark.parametrize("done", [1, 3, 4])
@each_travel
def test_resume_is_the_straight_run_to_the_last_bit(travel, done, dtype, kw):
    torch.manual_seed(0)
    straight = path(dtype=dtype, update_period=3, n_samples=2, seed=5, **kw)
    torch.manual_seed(0)
    halves = path(done=done, travel=travel, dtype=dtype, update_period=3, n_samples=2, seed=5, **kw)
    assert_same_run(halves, straight, rtol=0, atol=0)
    for state in halves[1]:
        assert all(
            value.dtype == (torch.float32 if "step" in key else kw.get("state_dtype", dtype))
            for key, value in state.items()
        )


def test_seed_decides_the_path():
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        runs.append(path(n=4, seed=seed))
    assert_same_run(runs[1], runs[0], rtol=0, atol=0)
    assert any(not torch.equal(p, q) for p, q in zip(runs[0][0], runs[2][0], strict=True))


def test_nobodys_random_stream_is_disturbed_or_matters():
    net, other, (x, y) = small_net(), small_net(), (t.float() for t in small_data())
    opts = AdaHessian(net.parameters(), n_samples=2), AdaHessian(other.parameters(), n_samples=2)
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        one_step(net, opts[0], x, y, "ordinary")
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(100)
        one_step(other, opts[1], x, y, "ordinary")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("travel", [through_pickle, through_deepcopy, through_state_dict])
def test_seed_and_count_travel_with_the_groups(travel):
    params = [param(4), param(3)]
    opt = AdaHessian([{"params": params[:1], "seed": 3}, {"params": params[1:], "update_period": 2}])
    for _ in range(3):
        opt.zero_grad()
        sum(p.pow(4).sum() for p in params).backward(create_graph=True)
        opt.step()
    opt.zero_grad()
    new, _ = travel(opt, params)
    assert [(g["seed"], g["draws"], g["age"]) for g in new.param_groups] == [(3, 3, 0), (0, 2, 1)]


# --- what copies and checkpoints ask for ------------------------------------------------------------------------------


@pytest.mark.parametrize("travel", [through_pickle, through_deepcopy])
def test_a_copy_averages_over_no_processes_if_the_original_did_not(travel):
    params = [param(3)]
    assert travel(AdaHessian(params, process_group=False), params)[0].process_group is False
    assert travel(AdaHessian(params), params)[0].process_group is None


def probe(lr=0.0, grad=0.0, options=None):
    "An optimizer after the step by which `torch.distributed.checkpoint` asks what state it keeps."
    p = param(3)
    opt = AdaHessian([("p", p)], lr=lr, **(options or {}))
    p.grad = torch.full_like(p, grad)
    opt.step()
    return p, opt


def test_a_checkpoint_that_asks_for_the_state_counts_as_no_estimate():
    p, opt = probe(options=dict(update_period=3))
    group = opt.param_groups[0]
    assert (group["age"], group["draws"]) == (0, 0) and not opt.state[p]["exp_hessian_diag_sq"].any()
    p.grad = torch.zeros_like(p)
    opt.step()  # it has state by now, so this is a step like any other, of a parameter that a batch did not use
    assert (group["age"], group["draws"]) == (1, 1)


def test_only_gradients_of_zero_at_learning_rate_zero_ask_for_the_state():
    for wrong in (dict(grad=1.0), dict(grad=1.0, lr=0.1)):
        with pytest.raises(RuntimeError, match="that of p .*create_graph=True"):
            probe(**wrong)


@pytest.mark.parametrize("kind", ["is_sharded", "is_fsdp1_shard", "is_fsdp1_flat_param"])
def test_every_kind_of_sharded_parameter_is_refused_by_name(kind, monkeypatch):
    p, q = param(3), param(3)
    monkeypatch.setattr(sgd_sai.adahessian, kind, lambda x: x is q)
    with pytest.raises(ValueError, match="sharded parameters, such as second"):
        AdaHessian([("first", p), ("second", q)])
