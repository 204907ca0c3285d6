"MuonSaI: against PyTorch's Muon and SGDSaI, its rule, state, schedulers, and the errors of its groups."

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from sgd_sai import MuonSaI, SGDSaI
from sgd_sai.experiments.muon_adamw import MuonAdamW
from sgd_sai.experiments.optimizers import build_optimizer
from sgd_sai.internals.base import lr_of
from sgd_sai.muon_groups import hidden_matrices, muon_groups
from sgd_sai.orthogonalize import orthogonalize


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )


def gradients(model, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.randint(5, (16,))).backward()


def test_rule_takes_the_hidden_matrices():
    assert hidden_matrices(net()) == ["2.weight", "6.weight"]
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False))
    tied[2].weight = tied[0].weight
    assert hidden_matrices(tied) == ["1.weight"]  # after an embedding the first linear layer is hidden
    assert hidden_matrices(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))) == []
    attention = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 2))
    assert hidden_matrices(attention) == [
        f"1.{name}.weight" for name in ("self_attn.out_proj", "linear1", "linear2")
    ] + ["1.self_attn.in_proj_weight"] or set(hidden_matrices(attention)) == {
        "1.self_attn.in_proj_weight",
        "1.self_attn.out_proj.weight",
        "1.linear1.weight",
        "1.linear2.weight",
    }


def test_each_half_is_its_own_optimizer():
    "The rest moves as under SGDSaI alone, bit by bit; the matrices as under torch.optim.Muon up to bfloat16."
    model, alone, theirs = net(), net(), net()
    opt = MuonSaI(model, lr=0.02, sai_lr=0.03, weight_decay=0.1, rest="sgd_sai")
    names = set(hidden_matrices(model))
    rest = [(name, p) for name, p in alone.named_parameters() if name not in names]
    sai = SGDSaI(
        [
            {"params": [x for x in rest if x[1].ndim >= 2]},
            {"params": [x for x in rest if x[1].ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.03,
        weight_decay=0.1,
    )
    muon = (
        torch.optim.Muon([theirs.get_parameter("6.weight")], lr=0.02, weight_decay=0.1)
        if hasattr(torch.optim, "Muon")
        else None
    )
    for step in range(4):
        gradients(model, step)
        for other in (alone, theirs):
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                q.grad = p.grad.clone()
        for o in filter(None, (opt, sai, muon)):
            o.step()
    assert all(torch.equal(model.get_parameter(name), p) for name, p in rest)
    if muon:
        ours, there, start = (m.get_parameter("6.weight").detach() for m in (model, theirs, net()))
        assert (ours - there).norm() < 0.05 * (ours - start).norm()


def test_orthogonal_factor():
    M = torch.randn(3, 12, 30, dtype=torch.float64)
    factor, (U, _, Vh) = orthogonalize(M), torch.linalg.svd(M, full_matrices=False)
    assert factor.dtype == torch.float64 and torch.linalg.svdvals(factor).sub(1).abs().max() < 0.35
    assert nn.functional.cosine_similarity(factor.flatten(1), (U @ Vh).flatten(1)).min() > 0.97
    assert torch.equal(orthogonalize(M[0].T), orthogonalize(M[0]).T) and torch.allclose(orthogonalize(1e6 * M), factor)


@pytest.mark.parametrize(
    "copied", [lambda o: copy.deepcopy(o), lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_groups_and_defaults(copied):
    model = net()
    opt = MuonSaI(model, lr=0.02, rest="sgd_sai")
    gradients(model, 0)
    opt.step()
    other = copied(opt)
    assert [{k: v for k, v in g.items() if k != "params"} for g in other.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in opt.param_groups
    ]
    assert other.scales() == opt.scales()
    other.add_param_group({"params": [("more", nn.Parameter(torch.randn(3, 3)))]})
    added = other.param_groups[-1]
    assert not added["muon"] and added["lr"] * added["lr_factor"] == pytest.approx(0.03)


def test_groups_hold_hyperparameters_and_nothing_else():
    "The second set of defaults is no hyperparameter: it is neither in groups nor files, nor after a copy or a load."
    model = net()
    opt = MuonSaI(model, lr=0.02)
    copied, loaded = copy.deepcopy(opt), MuonSaI(net())
    loaded.load_state_dict(opt.state_dict())
    of_matrices = {"muon", "role", "stacked", "transposed", "split", "adjust_lr", "ns_steps", "ns_coefficients"}
    expected = {*SGDSaI(model.named_parameters()).param_groups[0], *of_matrices, "rest", "lr_factor"}
    for other in (opt, copied, pickle.loads(pickle.dumps(opt)), loaded):
        other.add_param_group({"params": [("more", nn.Parameter(torch.randn(3, 3)))]})
        assert all(set(group) == expected for group in other.param_groups + other.state_dict()["param_groups"])
    assert loaded.param_groups[-1]["lr"] == 0.02 and loaded.param_groups[-1]["lr_factor"] == 0.06


def test_resume_is_exact_and_schedulers_move_both_rates():
    model = net()
    opt = MuonSaI(model, lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    for step in range(3):
        gradients(model, step)
        opt.step()
        scheduler.step()
    assert [lr_of(g) for g in opt.param_groups] == pytest.approx([0.005, 0.0003, 0.0003, 0.0003])
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(opt.state_dict(), file)
    resumed = MuonSaI(twin, lr=1.0)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    for m, o in ((model, opt), (twin, resumed)):
        gradients(m, 9)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_rule_can_be_overridden_and_groups_say_themselves():
    model = net()
    opt = MuonSaI(model, matrices=lambda name, p: name == "8.weight")
    assert [g["muon"] for g in opt.param_groups] == [True, False, False] and opt.param_groups[0]["params"] == [
        model.get_parameter("8.weight")
    ]
    opt = MuonSaI(
        [
            {"params": [model.get_parameter("6.weight")], "muon": True, "lr": 0.5},
            {"params": [model.get_parameter("8.weight")]},
        ],
        lr=0.1,
        sai_lr=0.2,
        rest_momentum=0.9,
    )
    assert [lr_of(g) for g in opt.param_groups] == [0.5, 0.2]
    assert [g["momentum"] for g in opt.param_groups] == [0.95, 0.9]
    frozen = net()
    for p in frozen[0].parameters():
        p.requires_grad_(False)
    assert sum(len(g["params"]) for g in muon_groups(frozen)) == len(list(frozen.parameters())) - 2


def test_wrong_use_is_said():
    model = net()
    with pytest.raises(TypeError, match="give it the model"):
        MuonSaI(model.named_parameters())
    with pytest.raises(ValueError, match="real matrices"):
        MuonSaI([{"params": [nn.Parameter(torch.zeros(4))], "muon": True}])
    with pytest.raises(ValueError, match="Invalid learning rate"):
        MuonSaI(model, lr=-1.0)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        MuonSaI(model, sai_lr=-1.0)
    with pytest.raises(ValueError, match="does not support normalize"):
        MuonSaI([{"params": list(model.parameters()), "muon": False, "normalize": True}])
    opt, before = MuonSaI(model), copy.deepcopy(model.state_dict())
    gradients(model, 0)
    before = copy.deepcopy(model.state_dict())
    model[8].weight.grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="8.weight"):
        opt.step()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_low_precision_parameters_and_tensor_lr(dtype):
    a, b = net().to(dtype), net().to(dtype)
    one, other = MuonSaI(a, lr=0.02), MuonSaI(b, lr=torch.tensor(0.02), sai_lr=torch.tensor(0.0012))
    torch.manual_seed(3)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    one.step(), other.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert all(opt_state["momentum_buffer"].dtype == dtype for opt_state in one.state.values())


def test_muon_with_adamw_is_both():
    model, alone = net(), net()
    opt = build_optimizer("muon_adamw", model, {"lr": 0.02, "weight_decay": 0.1})
    assert isinstance(opt, MuonAdamW)
    names = set(hidden_matrices(model))
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in alone.named_parameters() if n not in names and p.ndim >= 2]},
            {"params": [p for n, p in alone.named_parameters() if n not in names and p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.003,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    for step in range(3):
        gradients(model, step)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            q.grad = p.grad.clone()
        opt.step(), adamw.step()
    for name, p in alone.named_parameters():
        if name not in names:
            torch.testing.assert_close(model.get_parameter(name), p)
        else:
            assert not torch.equal(model.get_parameter(name), p) and set(opt.state[model.get_parameter(name)]) == {
                "momentum_buffer"
            }
