"""torchtitan's checkpoints, without torchtitan: the state of the optimizer under flat names, saved and loaded by
torch.distributed.checkpoint.

The keys are `state.NAME.ENTRY` and `param_groups.NAME.KEY`. A new optimizer is asked what it keeps by a step with zero
gradients at a rate of zero, and is given that much. Groups are chosen by patterns, hold the names of their parameters,
and say `fused` or `foreach`."""

import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from programs import HIDDEN, RESUME, SETTINGS, Net, assert_same, plain, train

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI

IMPLEMENTATIONS = {
    "fused": dict(fused=True, foreach=False),
    "foreach": dict(fused=False, foreach=True),
    "for-loop": dict(fused=False, foreach=False),
}


def patterns(cls, **flags):
    "Pattern and hyperparameters of each group; the first that fits counts."
    if cls is MuonSaI:
        rest = {"rest": "sgd_sai"} if flags.get("fused") else {}  # the only rule with that form
        return [(r"^(up|down)\.weight$", dict(muon=True, **flags)), (r".*", dict(muon=False, **rest, **flags))]
    return [(r"\.bias$|norm", dict(weight_decay=0.0, **flags)), (r".*", dict(weight_decay=0.1, **flags))]


def by_pattern(cls, model, **flags):
    groups, left = [], dict(model.named_parameters())
    for pattern, settings in patterns(cls, **flags):
        names = [name for name in left if re.search(pattern, name)]
        groups.append(dict(params=[left.pop(name) for name in names], param_names=names, **SETTINGS[cls] | settings))
    return cls(groups)


def ask(opt):
    "The step by which a new optimizer shows what it keeps; nothing moves."
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    opt.step()
    for group, lr in zip(opt.param_groups, rates, strict=True):
        group["lr"] = lr
    opt.zero_grad()


def flat(opt):
    saved, found = opt.state_dict(), {}
    for group in saved["param_groups"]:
        for i, name in zip(group["params"], group["param_names"], strict=True):
            found |= {f"state.{name}.{key}": value for key, value in saved["state"].get(i, {}).items()}
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            found |= {f"param_groups.{name}.{key}": value for key, value in settings.items()}
    return found


def load_flat(opt, found):
    state, groups = {}, []
    for group in opt.param_groups:
        first = len(state)
        for name, p in zip(group["param_names"], group["params"], strict=True):
            state[len(state)] = {key: found[f"state.{name}.{key}"] for key in opt.state[p]}
        keys = [key for key in group if key not in ("params", "param_names")]
        settings = {key: found[f"param_groups.{group['param_names'][0]}.{key}"] for key in keys}
        groups.append(dict(params=list(range(first, len(state))), **settings))
    opt.load_state_dict(dict(state=state, param_groups=groups))


def resumed(cls, folder, **flags):
    "The model after six steps, with a checkpoint and a new start in the middle."
    model = Net()
    opt = by_pattern(cls, model, **flags)
    train(model, opt, stop=RESUME)
    dcp.save(dict(model=model.state_dict(), optimizer=flat(opt)), checkpoint_id=folder)
    again = Net(seed=9)
    opt = by_pattern(cls, again, **flags)
    start = [p.detach().clone() for p in again.parameters()]
    ask(opt)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), start, strict=True))
    both = dict(model=again.state_dict(), optimizer=flat(opt))
    dcp.load(both, checkpoint_id=folder)
    again.load_state_dict(both["model"])
    load_flat(opt, both["optimizer"])
    train(again, opt, start=RESUME)
    return again, opt


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_a_flat_checkpoint_goes_on_exactly(cls, implementation, tmp_path):
    "In all three implementations that torchtitan knows."
    flags = IMPLEMENTATIONS[implementation]
    again, opt = resumed(cls, str(tmp_path), **flags)
    assert_same(again, plain(lambda model: by_pattern(cls, model, **flags)))
    assert {name for group in opt.param_groups for name in group["param_names"]} == set(dict(again.named_parameters()))


@pytest.mark.parametrize("cls", [SGDSaI, Adan, AdaHessian], ids=lambda cls: cls.__name__)
def test_low_precision_state_goes_on_exactly(cls, tmp_path):
    "torchtitan's `fused_opt_states_bf16` is `state_dtype` here; the rounding draws from PyTorch's generator."
    settings = dict(state_dtype=torch.bfloat16) | (dict(rounding="nearest") if cls is SGDSaI else {})
    again, opt = resumed(cls, str(tmp_path), **settings)
    assert_same(again, plain(lambda model: by_pattern(cls, model, **settings)))
    kept = {value.dtype for state in opt.state.values() for value in state.values() if getattr(value, "ndim", 0)}
    assert kept == {torch.bfloat16}


def test_patterns_mark_the_hidden_matrices():
    opt = by_pattern(MuonSaI, Net())
    assert {name for group in opt.param_groups if group["muon"] for name in group["param_names"]} == HIDDEN
