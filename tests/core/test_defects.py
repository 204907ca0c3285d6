"""The eleven defects of the released SGD-SaI (`sgd-sai` 1.0.3), one test each: real there, and absent here.

Where the authors' own class can show the defect in a few lines, the test shows it first (their wheel is fetched once
with pip and cached).
"""

import copy
import math
import sys

import pytest
import torch
import torch.distributed as dist
from common import each_travel, noise, on_two_processes, param, steps, twin
from torch import nn

from sgd_sai.experiments.peers import authors_sgd_sai
from sgd_sai.gsnr import gsnr
from sgd_sai.sgd_sai import SGD_sai, SGDSaI

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")
IMPLEMENTATIONS = {
    "forloop": dict(foreach=False, fused=False),
    "foreach": dict(foreach=True),
    "fused": dict(fused=True),
    "default": {},
}
each_implementation = pytest.mark.parametrize("flags", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@pytest.fixture(scope="module")
def Authors():
    return authors_sgd_sai()


@each_implementation
def test_defect_01_zero_first_gradient_does_not_freeze(Authors, flags):
    p, lr, wd = param(4, 3), 1e-2, 0.1
    theirs, ours, late = twin(p), twin(p), twin(p)
    grads = noise(p, 5)
    zero = torch.zeros_like(p)

    steps(Authors([theirs], lr=lr, weight_decay=wd), [theirs], [zero], *([g] for g in grads))
    torch.testing.assert_close(theirs.detach(), p.detach() * (1 - lr * wd) ** 6)  # it only ever decays

    opt = SGDSaI([ours], lr=lr, weight_decay=wd, **flags)
    steps(opt, [ours], [zero], [zero])
    torch.testing.assert_close(ours.detach(), p.detach() * (1 - lr * wd) ** 2)
    assert opt.scales() == {}
    late.data.copy_(ours)
    fresh = SGDSaI([late], lr=lr, weight_decay=wd, **flags)
    steps(opt, [ours], *([g] for g in grads))
    steps(fresh, [late], *([g] for g in grads))
    assert torch.equal(ours, late)  # as if it had started with the first gradient that says something
    assert list(opt.scales().values()) == pytest.approx([gsnr(grads[0]).item()], rel=1e-6)


class LoRA(nn.Module):
    "A frozen linear layer with a trainable product of two thin matrices beside it, B zero at the start."

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(16, 8, bias=False).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(4, 16) / 4), nn.Parameter(torch.zeros(8, 4))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


def train_lora(make_optimizer, n=40):
    torch.manual_seed(1)
    model, x = LoRA(), torch.randn(64, 16)
    y = x @ torch.randn(16, 8) / 4
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    opt = make_optimizer([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    losses = []
    for _ in range(n):
        opt.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        losses.append(loss.item())
        opt.step()
    return {name: not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before}, losses


def test_defect_01_lora_matrix_a_moves(Authors):
    moved, stuck = train_lora(lambda named: Authors([p for _, p in named], lr=0.02, weight_decay=0.0))
    assert moved == {"A": False, "B": True}
    moved, losses = train_lora(lambda named: SGDSaI(named, lr=0.02, weight_decay=0.0))
    assert moved == {"A": True, "B": True}
    assert losses[-1] < 0.9 * stuck[-1]


@each_implementation
def test_defect_02_one_entry_and_constant_gradients_have_a_bounded_scale(Authors, flags):
    lr = 1e-2
    for shape, value, largest in (((), 0.5, 1.0), ((1,), -3.0, 1.0), ((1, 1), 1e-6, 1.0), ((100,), 0.1, 100.0)):
        p = param(*shape)
        g = torch.full_like(p, value)
        theirs, ours = twin(p), twin(p)
        steps(Authors([theirs], lr=lr, weight_decay=0.0), [theirs], [g])
        assert (theirs - p).abs().max() > 1e3 * lr * largest * abs(value) or abs(
            value
        ) < 1e-5  # thrown away; the last is saved by eps alone
        opt = SGDSaI([ours], lr=lr, weight_decay=0.0, **flags)
        steps(opt, [ours], [g])
        assert list(opt.scales().values()) == [pytest.approx(largest, rel=1e-6)]
        torch.testing.assert_close(ours.detach(), p.detach() - lr * largest * g)

    p = param(100)
    opt = SGDSaI([p], max_ratio=3.0, **flags)
    steps(opt, [p], [torch.full_like(p, 0.1)])
    assert list(opt.scales().values()) == [pytest.approx(30.0)]
    g = torch.randn(400) + 0.75  # as far from mean 0 as norm layers get: a quarter above sqrt(n)
    p = param(400)
    opt = SGDSaI([p], **flags)
    steps(opt, [p], [g])
    assert 1.2 * 20 < gsnr(g) < 1.4 * 20 and list(opt.scales().values()) == [pytest.approx(gsnr(g).item(), rel=1e-6)]


@each_implementation
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_defect_03_non_finite_first_gradient_is_refused_and_not_kept(Authors, poison, flags):
    p, q = param(4, 3), param(5)
    good = [noise(p, 3), noise(q, 3)]
    bad = good[1][0].clone()
    bad[2] = poison

    theirs = [twin(p), twin(q)]
    opt = Authors(theirs)
    steps(opt, theirs, [good[0][0], bad])
    theirs[1].data.copy_(q)
    opt.state[theirs[1]].pop("momentum_buffer")  # even with the momentum made anew
    steps(opt, theirs, *zip(*good, strict=True))
    assert not theirs[1].isfinite().all()

    ours, clean = [twin(p), twin(q)], [twin(p), twin(q)]
    opt = SGDSaI([("first.weight", ours[0]), ("second.bias", ours[1])], **flags)
    with pytest.raises(RuntimeError, match="second.bias is not finite") as error:
        steps(opt, ours, [good[0][0], bad])
    assert "first.weight" not in str(error.value)
    assert torch.equal(ours[0], p) and torch.equal(ours[1], q) and not opt.scales() and not any(opt.state.values())
    other = SGDSaI(clean, **flags)
    steps(opt, ours, *zip(*good, strict=True))
    steps(other, clean, *zip(*good, strict=True))
    assert torch.equal(ours[0], clean[0]) and torch.equal(ours[1], clean[1])


@each_implementation
def test_defect_04_parameters_may_join_at_any_time(Authors, flags):
    p, q, r = param(4, 3), param(3), param(2, 5)
    grads = {id(x): noise(x, 6) for x in (p, q, r)}

    theirs = [twin(p), twin(q)]
    with pytest.raises(KeyError, match="gsnr"):  # frozen at first
        steps(Authors(theirs), theirs, [grads[id(p)][0], None], [grads[id(p)][1], grads[id(q)][1]])
    opt = Authors([theirs[0]])
    steps(opt, theirs[:1], [grads[id(p)][0]])
    opt.add_param_group({"params": [theirs[1]]})
    with pytest.raises(KeyError, match="gsnr"):
        steps(opt, theirs, [grads[id(p)][0], grads[id(q)][0]])

    ours = [twin(p), twin(q), twin(r)]
    opt = SGDSaI(ours[:2], **flags)
    for t in range(6):
        if t == 4:
            opt.add_param_group({"params": [ours[2]], "lr": 0.1})
        for x, mine, start in zip((p, q, r), ours, (0, 2, 4), strict=True):
            mine.grad = grads[id(x)][t].clone() if t >= start else None
        opt.step()
    for x, mine, start in zip((p, q, r), ours, (0, 2, 4), strict=True):
        alone = twin(x)
        other = SGDSaI([alone], lr=0.1 if x is r else 1e-2, **flags)
        steps(other, [alone], *([g] for g in grads[id(x)][start:]))
        assert torch.equal(mine, alone)
        assert opt.state[mine]["gsnr"] == other.state[alone]["gsnr"]


@each_implementation
def test_defect_05_zero_momentum_is_plain_scaled_sgd(Authors, flags):
    p, q = param(4, 3), param(4, 3)
    grads = [noise(p, 3), noise(q, 3)]

    theirs = twin(p)
    with pytest.raises(UnboundLocalError):
        steps(Authors([theirs], momentum=0.0), [theirs], [grads[0][0]])
    theirs = [twin(p), twin(q)]
    opt = Authors([{"params": theirs[0]}, {"params": theirs[1], "momentum": 0.0}], weight_decay=0.0)
    steps(opt, theirs, [grads[0][0], grads[1][0]])
    moved = q.detach() - theirs[1].detach()
    assert (
        torch.nn.functional.cosine_similarity(moved.flatten(), grads[0][0].flatten(), dim=0) > 0.9999
    )  # along the other's gradient

    ours, lr, wd = [twin(p), twin(q)], 1e-2, 0.1
    opt = SGDSaI([{"params": ours[0]}, {"params": ours[1], "momentum": 0.0}], lr=lr, weight_decay=wd, **flags)
    expected, G = q.detach().clone(), gsnr(grads[1][0])
    for t in range(3):
        steps(opt, ours, [grads[0][t], grads[1][t]])
        expected = expected * (1 - lr * wd) - lr * G * grads[1][t]
        torch.testing.assert_close(ours[1].detach(), expected)
    assert set(opt.state[ours[0]]) == {"gsnr", "momentum_buffer"} and set(opt.state[ours[1]]) == {"gsnr"}


def test_defect_06_closure_is_evaluated_once(Authors):
    p, calls = param(4, 3), []

    def closure():
        calls.append(torch.is_grad_enabled())
        p.grad = torch.ones_like(p) + torch.randn_like(p)
        return torch.tensor(len(calls))

    opt = Authors([p])
    opt.step(closure)
    assert len(calls) == 2
    calls.clear()
    for make in (SGDSaI, SGD_sai):
        for flags in IMPLEMENTATIONS.values() if make is SGDSaI else [{}]:
            opt = make([p], **flags)
            for t in range(1, 4):
                assert opt.step(closure).item() == t and calls == [True] * t
            calls.clear()
    opt = SGD_sai([p])
    assert opt.warmup_step(closure).item() == 1 and calls == [True]


@each_travel
@each_implementation
def test_defect_07_resume_keeps_the_measured_scales(Authors, flags, travel):
    start = [param(4, 3), param(5), param(2, 2)]
    grads = list(zip(*(noise(p, 6) for p in start), strict=True))

    theirs = [twin(p) for p in start]
    opt = Authors(theirs)
    steps(opt, theirs, *grads[:3])
    before = [opt.state[p]["gsnr"].item() for p in theirs]
    opt, theirs = travel(opt, theirs)
    try:
        steps(opt, theirs, *grads[3:])
        after = [opt.state[p]["gsnr"].item() for p in theirs]
    except AttributeError as error:  # pickle and deepcopy lose the flag altogether
        assert "has_warmup" in str(error)
        after = None
    assert after != before

    ours = [twin(p) for p in start]
    opt = SGDSaI([{"params": ours[:2]}, {"params": ours[2:], "momentum": 0.5, "lr": 0.1}], **flags)
    steps(opt, ours, [None if p is ours[1] else g for p, g in zip(ours, grads[0], strict=True)], *grads[1:3])
    scales = [opt.state[p]["gsnr"] for p in ours]
    new, copies = travel(opt, ours)
    assert all(a is not b for a, b in zip(ours, copies, strict=True))
    steps(opt, ours, *grads[3:])
    steps(new, copies, *grads[3:])
    assert [opt.state[p]["gsnr"] for p in ours] == [new.state[p]["gsnr"] for p in copies] == scales
    assert all(torch.equal(a, b) for a, b in zip(ours, copies, strict=True))
    assert {name for name in vars(new) if not name.startswith("_")} == {
        "defaults",
        "state",
        "param_groups",
    }  # no flag beside the state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_defect_08_statistic_keeps_its_precision_whatever_the_parameter(Authors, dtype):
    p = param(37, 41, dtype=dtype)
    grads = noise(p, 6)
    exact = gsnr(grads[0].double()).item()

    theirs = twin(p)
    opt = Authors([theirs])
    steps(opt, [theirs], [grads[0]])
    assert opt.state[theirs]["gsnr"].dtype == dtype and abs(opt.state[theirs]["gsnr"].item() / exact - 1) > 1e-5

    for capturable in (False, True):
        ours = twin(p)
        opt = SGDSaI([ours], capturable=capturable, state_dtype=torch.float32)
        steps(opt, [ours], *([g] for g in grads[:3]))
        G = opt.state[ours]["gsnr"]
        assert float(G) == pytest.approx(exact, rel=1e-6) and opt.scales() == {opt.name_of(ours): float(G)}
        assert not capturable or G.dtype == torch.float32
        assert opt.state[ours]["momentum_buffer"].dtype == torch.float32
        copy_ = twin(ours)
        new = SGDSaI([copy_])
        new.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert float(new.state[copy_]["gsnr"]) == float(G)
        assert torch.equal(new.state[copy_]["momentum_buffer"], opt.state[ours]["momentum_buffer"])
        assert new.state[copy_]["momentum_buffer"].dtype == torch.float32
        steps(opt, [ours], *([g] for g in grads[3:]))
        steps(new, [copy_], *([g] for g in grads[3:]))
        assert torch.equal(ours, copy_)

    # PyTorch's own loading, which the authors inherit, rounds the number
    saved = {"state": {0: {"gsnr": torch.tensor(exact, dtype=torch.float32), "momentum_buffer": torch.zeros_like(p)}}}
    saved["param_groups"] = opt.state_dict()["param_groups"]
    other = Authors([twin(p)])
    other.load_state_dict(copy.deepcopy(saved))
    assert next(iter(other.state.values()))["gsnr"].dtype == dtype
    ours = SGDSaI([twin(p)])
    ours.load_state_dict(copy.deepcopy(saved))
    assert float(next(iter(ours.state.values()))["gsnr"]) == torch.tensor(exact, dtype=torch.float32).item()


def test_defect_09_silent_and_complete(Authors, capfd, monkeypatch):
    monkeypatch.delitem(
        sys.modules["sgd_sai_authors"].__dict__, "print"
    )  # as published, not as it is loaded for comparisons
    p = param(4, 3)
    steps(Authors([p]), [p], noise(p, 1))
    assert "warmup" in capfd.readouterr().out

    grads = noise(p, 4)
    reached = {}
    for name, flags in {
        **IMPLEMENTATIONS,
        "capturable": dict(capturable=True),
        "tensor lr": dict(lr=torch.tensor(1e-2)),
    }.items():
        for maximize in (False, True):
            mine = twin(p)
            opt = SGDSaI([mine], maximize=maximize, weight_decay=0.0, **flags)
            steps(opt, [mine], *([-g] if maximize else [g] for g in grads))
            reached[name, maximize] = mine.detach()
    for value in reached.values():
        torch.testing.assert_close(value, reached["forloop", False])

    mine = twin(p)
    opt = SGDSaI([mine], lr=torch.tensor(1e-2), capturable=True, weight_decay=0.0)
    compiled = torch.compile(opt.step, backend="eager")
    for g in grads:
        mine.grad = g.clone()
        compiled()
    torch.testing.assert_close(mine.detach(), reached["forloop", False])

    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 1, 3])).sum().backward()
    opt = SGDSaI(table.named_parameters())
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients, which parameter weight has"):
        opt.step()
    assert torch.equal(table.weight, before) and not opt.scales()
    assert capfd.readouterr().out == ""


def on_two_ranks(rank, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    found = {}
    shapes = [
        ("rows", (8, 6), Shard(0)),
        ("columns", (3, 4), Shard(1)),
        ("uneven", (5, 2), Shard(0)),
        ("whole", (7,), Replicate()),
    ]
    start = {name: torch.randn(shape) for name, shape, _ in shapes}
    grads = {
        name: [
            torch.randn(shape) + 0.3 * k * torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)) for k in range(4)
        ]
        for name, shape, _ in shapes
    }
    for label, flags in {
        "default": {},
        "forloop": dict(foreach=False, fused=False),
        "foreach": dict(foreach=True),
    }.items():
        placed = {
            name: nn.Parameter(distribute_tensor(start[name].clone(), mesh, [placement]))
            for name, _, placement in shapes
        }
        opt = SGDSaI(placed.items(), lr=0.05, **flags)
        for t in range(4):
            for name, _, placement in shapes:
                placed[name].grad = distribute_tensor(grads[name][t].clone(), mesh, [placement])
            opt.step()
        found[label] = opt.scales(), {name: p.full_tensor().detach() for name, p in placed.items()}
    torch.save((start, grads, found), f"{out}.{rank}")
    dist.destroy_process_group()


def test_defect_10_sharded_gradient_has_another_scale(tmp_path):
    g = torch.randn(64, 64) * torch.rand(64, 1)
    for k in (2, 4, 8):
        shards = g.flatten().chunk(k)
        G = [gsnr(shard).item() for shard in shards]
        assert G == pytest.approx(
            [gsnr(g).item() / math.sqrt(k)] * k, rel=0.02
        )  # so a shard must not be measured as if it were the tensor

    # a DTensor knows the tensor that its shard belongs to: the scale is that of the whole, and the same on every rank
    results = on_two_processes(on_two_ranks, tmp_path)
    start, grads, _ = results[0]
    whole = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    opt = SGDSaI(whole.items(), lr=0.05)
    for t in range(4):
        for name, p in whole.items():
            p.grad = grads[name][t].clone()
        opt.step()
    for _, _, found in results:
        for scales, params in found.values():
            assert scales == pytest.approx(opt.scales(), rel=1e-6)
            assert scales == results[0][2]["default"][0]
            for name, p in whole.items():
                torch.testing.assert_close(params[name], p.detach())


@each_implementation
def test_defect_11_scale_does_not_depend_on_the_unit_of_the_loss(Authors, flags):
    p = param(12, 11)
    g = torch.randn_like(p)
    G = gsnr(g).item()

    theirs = twin(p)
    opt = Authors([theirs])
    steps(opt, [theirs], [g * 1e-8])
    assert opt.state[theirs]["gsnr"].item() == pytest.approx(G / 2, rel=0.1)

    for unit in (
        1e10,
        1.0,
        1e-4,
        1e-6,
        1e-8,
        1e-10,
        1e-20,
        1e-30,
        1e25,
    ):  # the last two have squares that float32 cannot hold
        ours = twin(p)
        opt = SGDSaI([ours], **flags)
        steps(opt, [ours], [g * unit])
        assert list(opt.scales().values()) == [pytest.approx(G, rel=2e-3)], unit
    assert all(gsnr(g * unit).item() == pytest.approx(G, rel=2e-3) for unit in (1e10, 1e-6, 1e-8, 1e-12))
    assert gsnr(g, eps=1e-8).item() == pytest.approx(G, rel=1e-7) and gsnr(g * 1e-8, eps=0.0).item() == pytest.approx(
        gsnr(g, eps=0.0).item(), rel=1e-6
    )
