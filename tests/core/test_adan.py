"Adan beside the arithmetic and the checkpoints of the released code, by hand, and on sharded tensors."

import io
import itertools
import math
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from adan_released import Released, each_implementation
from common import (
    ConvNet,
    TransformerBlock,
    assert_same_path,
    noise,
    param,
    recorded_gradients,
    same_start,
    steps,
    train,
    twin,
)
from torch import nn

import sgd_sai.adan_kernels
from sgd_sai.adan import Adan
from sgd_sai.internals.base import debias

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")


@pytest.fixture(scope="module", params=[ConvNet, TransformerBlock])
def task(request):
    "A model class and the gradients of 20 steps of training it."
    return request.param, recorded_gradients(request.param)


def two_groups(model, matrices_prox=True):
    "Matrices and the rest, which share no hyperparameter; one of them has the proximal decay, the other AdamW's."
    return [
        {
            "params": [p for p in model.parameters() if p.ndim > 1],
            "lr": 0.01,
            "weight_decay": 0.1,
            "no_prox": not matrices_prox,
        },
        {
            "params": [p for p in model.parameters() if p.ndim <= 1],
            "lr": 0.003,
            "betas": (0.9, 0.7, 0.95),
            "eps": 1e-4,
            "weight_decay": 0.5,
            "no_prox": matrices_prox,
        },
    ]


@pytest.fixture(scope="module")
def released_paths(task):
    "The parameters after each step of the released arithmetic in float64, for both assignments of the forms of decay."
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
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert set(opt.state[p]) == set(reference.state[q]) | {"step"} and opt.state[p]["step"] == len(grads)
        for key, value in reference.state[q].items():
            assert opt.state[p][key].dtype == p.dtype
            assert (opt.state[p][key].double() - value).abs().max() <= 1e-6 * value.abs().max(), key


@both_decays
def test_steps_in_chunks_equal_the_released_arithmetic(task, released_paths, matrices_prox, monkeypatch):
    monkeypatch.setattr(sgd_sai.adan_kernels, "CACHE_CHUNK", 50)
    model_class, grads = task
    model = same_start(model_class)
    assert_same_path(
        train(model, Adan(two_groups(model, matrices_prox), foreach=False).step, grads), released_paths[matrices_prox]
    )


@each_implementation
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_first_step_is_lr_times_the_sign_of_the_gradient(dtype, flags):
    for g in (torch.tensor([3.0, -0.25, 40.0, -7.0, 1.5, -1e-2]), torch.tensor(-2.0)):
        g = torch.complex(g, -0.5 * g) if dtype.is_complex else g.to(dtype)
        p = nn.Parameter(torch.zeros_like(g))
        opt = Adan([p], lr=0.01, **flags)
        steps(opt, [p], [g])
        sign = torch.complex(g.real.sign(), g.imag.sign()) if dtype.is_complex else g.sign()
        torch.testing.assert_close(p.detach(), -0.01 * sign, rtol=2e-6, atol=0) if dtype not in (
            torch.bfloat16,
            torch.float16,
        ) else None
        assert dtype not in (torch.bfloat16, torch.float16) or torch.equal(p, torch.tensor(-0.01).to(dtype) * sign)


@each_implementation
@pytest.mark.parametrize("maximize", [False, True])
def test_two_steps_by_hand(flags, maximize):
    # all betas 1/2, gradients 4 and 2: m/c1 = 4, then 8/3; v/c2 = 0, then -4/3; n/c3 = 16, then 6;
    # so u = 1, then (8/3 - 2/3)/sqrt 6
    sign, u = -1 if maximize else 1, 2 / math.sqrt(6)
    p, q = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    opt = Adan(
        [{"params": [p]}, {"params": [q], "no_prox": True}],
        lr=0.1,
        betas=(0.5, 0.5, 0.5),
        eps=0,
        weight_decay=0.5,
        maximize=maximize,
        **flags,
    )
    prox, adamw = 1.0, 1.0
    for g, update in ((4.0, 1.0), (2.0, u)):
        steps(opt, [p, q], [torch.tensor([g])] * 2)
        prox, adamw = (prox - sign * 0.1 * update) / 1.05, adamw * 0.95 - sign * 0.1 * update
        assert p.item() == pytest.approx(prox, rel=1e-6) and q.item() == pytest.approx(adamw, rel=1e-6)
    assert {
        key: opt.state[p][key].item() for key in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad", "step")
    } == dict(exp_avg=2, exp_avg_diff=-1, exp_avg_sq=4.5, neg_pre_grad=-2, step=2)


def test_bias_corrections_of_step_counts_on_the_device_are_exact():
    # 1 - beta^t in float32 would have lost four digits where it matters most, in the first steps
    for beta, t in itertools.product((0.0, 0.5, 0.98, 0.999, 0.9999), (1, 2, 100, 100_000)):
        assert (
            debias(beta, torch.tensor(float(t))).item()
            == pytest.approx(debias(beta, t), rel=3e-7)
            == pytest.approx(1 - beta**t, rel=1e-11)
        )


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    "Of one process: what matters here is the type of the tensors."
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('mesh') / 'store'}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "kw", [{}, dict(foreach=True), dict(capturable=True, no_prox=True), dict(restart_radius=0.05)], ids=str
)
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
    assert all(
        isinstance(other.state[sharded][key], DTensor) for key in ("exp_avg", "neg_pre_grad") if sharded in other.state
    )


def from_file(opt):
    "The state of `opt` after a journey through a file."
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continued(task, flags, done, **settings):
    """The released arithmetic for `done` steps in float32, and then its path in float64 beside that of Adan.

    Returns both paths, the `Adan` that has loaded the file, and the warnings of loading."""
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
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.003] and [
        group["no_prox"] for group in opt.param_groups
    ] == [False, True]


def test_released_checkpoints_with_clipping_continue_with_a_warning(task):
    theirs, mine, _, caught = continued(task, {}, 5, max_grad_norm=0.5)
    assert_same_path(mine, theirs)
    assert caught and all(
        "clipping gradients at norm 0.5: call torch.nn.utils.clip_grad_norm_ before step" in str(w.message)
        for w in caught
    )
    assert all(w.filename == __file__ for w in caught)  # it points at the line that loads


def test_released_checkpoints_continue_after_a_restart():
    start = [param(4, 3), param(5)]
    grads = list(zip(*(noise(p, 9) for p in start), strict=True))
    theirs, ours, fresh = ([twin(p) for p in start] for _ in range(3))
    reference = Released(theirs, foreach=False)
    steps(reference, theirs, *grads[:5])
    reference.restart_opt()
    opt = Adan(ours)
    opt.load_state_dict(from_file(reference))
    for p, q, r in zip(theirs, ours, fresh, strict=True):
        q.data.copy_(p), r.data.copy_(p)
    steps(reference, theirs, *grads[5:])
    steps(opt, ours, *grads[5:])
    steps(Adan(fresh, foreach=False), fresh, *grads[5:])
    for p, q, r in zip(theirs, ours, fresh, strict=True):
        assert torch.equal(q, r) and (q - p).abs().max() <= 1e-6 * p.abs().max()


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
