"""The groups of MuonSaI: marks that are missing, misspelt or of another class, one lr for all groups, the sorting."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sgd_sai import MuonSaI, SGDSaI
from sgd_sai.experiments.muon_adamw import MuonAdamW
from sgd_sai.internals.base import lr_of
from sgd_sai.muon_groups import hidden_matrices, muon_groups

pytestmark = pytest.mark.usefixtures("seeded")
both = pytest.mark.parametrize("cls", [MuonSaI, MuonAdamW])


def matrix():
    return nn.Parameter(torch.randn(4, 3))


def vector():
    return nn.Parameter(torch.randn(3))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 2))


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.empty_like(p).normal_(generator=generator)


# --- marks ----------------------------------------------------------------------------------------------------------


@both
def test_groups_of_which_none_is_marked_are_an_error_with_two_ways_out(cls):
    for groups in ([{"params": [matrix()]}, {"params": [vector()], "weight_decay": 0.0}], [{"params": matrix()}]):
        with pytest.raises(ValueError, match=rf"{cls.__name__} would run without Muon: give it the model, or groups"):
            cls(groups)


def decay_groups(model):
    "What programs do that build an optimizer from a class and its arguments."
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1, "lr_scale": 1.0},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def test_programs_that_make_the_groups_hear_that_muon_would_not_run():
    with pytest.raises(ValueError, match="none of the parameter groups says"):
        MuonSaI(decay_groups(net()), lr=0.02, weight_decay=0.1)
    with pytest.raises(TypeError, match="give it the model"):
        MuonSaI(net().parameters())
    with pytest.raises(TypeError, match="give it the model"):
        MuonSaI([*net().named_parameters()])
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        MuonSaI(matrix())
    with pytest.raises(ValueError, match="empty parameter list"):
        MuonSaI([])


@both
def test_some_marks_suffice(cls):
    opt = cls([{"params": [matrix()], "muon": True}, {"params": [matrix(), vector()]}])
    assert [group["muon"] for group in opt.param_groups] == [True, False]


@both
def test_a_mark_that_says_no_does_not_suffice(cls):
    with pytest.raises(ValueError, match=rf"not all say that they do not, so {cls.__name__} would run without Muon"):
        cls([{"params": [matrix()]}, {"params": [vector()], "muon": False}])
    opt = cls([{"params": [matrix()], "use_muon": False}, {"params": [vector()], "muon": False}])
    assert not any(group["muon"] for group in opt.param_groups)


@both
@pytest.mark.parametrize(
    "key", ["Muon", "MOUN", "moun", "use_Muon", "usemuon", "use-muon", "use_moun", "trained_by_muon"]
)
def test_a_key_that_is_nearly_a_mark_is_named(cls, key):
    with pytest.raises(ValueError, match=f"unknown key {key!r}: did you mean '(use_)?muon'"):
        cls([{"params": [matrix()], key: True}, {"params": [vector()], "muon": False}])


def test_a_misspelt_stacked_is_named_and_other_keys_are_left_alone():
    with pytest.raises(ValueError, match="unknown key 'stack': did you mean 'stacked'"):
        MuonSaI([{"params": [matrix()], "muon": True, "stack": True}])
    own = {"name": "body", "lr_scale": 0.5, "initial_lr": 0.1, "fix_step": True, 3: "x"}
    assert own.items() <= MuonSaI([{"params": [matrix()], "muon": True, **own}]).param_groups[0].items()
    opt = MuonSaI([{"params": [matrix()], "muon": True}])
    with pytest.raises(ValueError, match="unknown key 'Muon'"):
        opt.add_param_group({"params": [matrix()], "Muon": True})
    assert len(opt.param_groups) == 1
    with pytest.raises(TypeError, match="must be a dict"):
        opt.add_param_group([matrix()])


@both
def test_use_muon_is_the_same_mark(cls):
    groups = [{"params": [matrix()], "use_muon": True}, {"params": [vector()], "use_muon": False}]
    opt = cls(groups)
    assert [group["muon"] for group in opt.param_groups] == [True, False]
    assert not any("use_muon" in group for group in opt.param_groups) and "use_muon" in groups[0]
    with pytest.raises(ValueError, match="muon=False and use_muon=True: keep one"):
        cls([{"params": [matrix()], "muon": False, "use_muon": True}])


@pytest.mark.parametrize("key", ["muon", "use_muon"])
def test_marks_as_text(key):
    opt = MuonSaI([{"params": [matrix()], key: "true"}, {"params": [vector()], key: "False"}])
    assert [group["muon"] for group in opt.param_groups] == [True, False]
    with pytest.raises(ValueError, match="Invalid muon value: 'perhaps'"):
        MuonSaI([{"params": [matrix()], key: "perhaps"}])


def keller_jordans_groups(model):
    "As for SingleDeviceMuonWithAuxAdam: these keys and no others."
    body, rest = [model[1].weight, model[2].weight], [model[0].weight, model[3].weight, model[0].bias, model[3].bias]
    return [
        dict(params=body, use_muon=True, lr=0.03, momentum=0.9, weight_decay=0.01),
        dict(params=rest, use_muon=False, lr=3e-3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.02),
    ]


def test_groups_for_keller_jordans_class_work_as_they_are():
    model, twin = net(), net()
    with pytest.warns(UserWarning, match="written for Adam.* the momentum is 0.8.* its lr of 0.003 is used as it is"):
        opt = MuonSaI(keller_jordans_groups(model), rest="sgd_sai")
    matrices, rest = opt.param_groups
    assert (matrices["lr"], matrices["momentum"], matrices["weight_decay"], matrices["muon"]) == (0.03, 0.9, 0.01, True)
    assert (lr_of(rest), rest["momentum"], rest["weight_decay"], rest["eps"]) == (3e-3, 0.8, 0.02, 1e-10)
    assert "betas" not in rest
    names = {p: name for name, p in twin.named_parameters()}
    sai = SGDSaI([(names[p], p) for p in keller_jordans_groups(twin)[1]["params"]], 3e-3, 0.8, 0.02, 1e-10)
    for seed in range(3):
        give_gradients(model, seed), give_gradients(twin, seed)
        opt.step(), sai.step()
    assert torch.equal(model[0].weight, twin[0].weight) and torch.equal(model[3].bias, twin[3].bias)
    with pytest.raises(ValueError, match="Invalid beta parameter at index 0: 1.5"):
        MuonSaI([dict(params=[vector()], use_muon=False, betas=(1.5, 0.9))])


@pytest.mark.parametrize("rule, momentum", [("row_norm", 0.95), ("sgd_sai", 0.9)])
def test_a_group_that_is_added_without_a_mark_is_stepped_by_the_rule_and_a_warning_says_so(rule, momentum):
    opt = MuonSaI(net(), lr=0.02, sai_lr=0.05, rest=rule)
    with pytest.warns(UserWarning, match=f"neither muon=True nor muon=False is stepped by rest='{rule}'"):
        opt.add_param_group({"params": [("more", matrix())]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.add_param_group({"params": [("vector", vector())]})
        opt.add_param_group({"params": [("marked", matrix())], "muon": True})
        opt.add_param_group({"params": [("marked too", matrix())], "use_muon": False})
    *_, more, plain, marked, unmarked = opt.param_groups
    assert [group["muon"] for group in (more, plain, marked, unmarked)] == [False, False, True, False]
    assert [lr_of(group) for group in (more, marked)] == pytest.approx([0.05, 0.02])
    assert [group["momentum"] for group in (more, marked)] == [momentum, 0.95]


@both
def test_a_model_without_hidden_matrices_is_said(cls):
    with pytest.warns(UserWarning, match=f"Sequential has no hidden matrix .* {cls.__name__} runs without Muon"):
        cls(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(net())


def test_stacked_and_lr_factor_are_checked():
    for wrong in ("perhaps", None, 2):
        with pytest.raises(ValueError, match="Invalid stacked value"):
            MuonSaI([{"params": [nn.Parameter(torch.ones(2, 3, 3))], "muon": True, "stacked": wrong}])
    with pytest.raises(ValueError, match=r"a tensor of shape \(4, 3\) is not a stack of matrices"):
        MuonSaI([{"params": [matrix()], "muon": True, "stacked": True}])
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Invalid lr_factor value"):
            MuonSaI([{"params": [matrix()], "muon": True, "lr_factor": wrong}])
    with pytest.raises(ValueError, match="real matrices"):
        MuonSaI([{"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], "muon": True}])


# --- one lr for all groups ------------------------------------------------------------------------------------------


def write_one_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


def one_cycle(opt, lr):
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=lr * 25, total_steps=10)  # begins with a 25th


def cyclic(opt, lr):
    torch.optim.lr_scheduler.CyclicLR(opt, base_lr=lr, max_lr=1.0, cycle_momentum=False)


def write_into_a_tensor(opt, lr):
    for group in opt.param_groups:
        group["lr"] = torch.tensor(lr, dtype=torch.float64)


@both
@pytest.mark.parametrize("write", [write_one_lr, one_cycle, cyclic, write_into_a_tensor])
@pytest.mark.parametrize("rate", [None, 0.006])
def test_a_program_that_writes_one_lr_leaves_the_ratio_of_the_rates(cls, write, rate):
    name, usual = {MuonSaI: ("sai_lr", 0.06), MuonAdamW: ("adamw_lr", 0.15)}[cls]
    factor = usual if rate is None else rate / 0.02
    opt, twin = (cls(net(), lr=0.02, **({name: rate} if rate else {})) for _ in range(2))
    write(opt, 0.08)
    assert [float(lr_of(group)) for group in opt.param_groups] == pytest.approx([0.08] + [0.08 * factor] * 3)
    # and the step uses it
    expected = cls(net(), lr=0.08, **{name: 0.08 * factor})
    ends = []
    for each in (opt, expected, twin):
        params = [p for group in each.param_groups for p in group["params"]]
        for i, p in enumerate(params):
            p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) + i).reshape(p.shape)
        each.step()
        ends.append([p.detach() for p in params])
    for p, q, r in zip(*ends, strict=True):
        torch.testing.assert_close(p, q)
        assert (p - r).abs().max() > 1e-4


def rates(opt):
    return [float(lr_of(group)) for group in opt.param_groups]


@both
def test_rates_that_are_given(cls):
    name = {MuonSaI: "sai_lr", MuonAdamW: "adamw_lr"}[cls]
    assert rates(cls(net(), lr=0.02, **{name: 0.3})) == pytest.approx([0.02, 0.3, 0.3, 0.3])
    assert rates(cls(net(), lr=0.02, **{name: 0.0})) == [0.02, 0.0, 0.0, 0.0]
    assert rates(cls(net(), lr=0.0, **{name: 0.3})) == [0.0, 0.3, 0.3, 0.3]  # no multiple of lr
    assert rates(cls(net(), lr=0.0)) == [0.0, 0.0, 0.0, 0.0]
    assert all(group["lr"] == 0.02 for group in cls(net(), lr=0.02, **{name: 0.3}).param_groups)


def test_rates_that_are_tensors_or_text():
    lr = torch.tensor(0.02)
    opt = MuonSaI(net(), lr=lr)
    assert all(group["lr"] is lr for group in opt.param_groups)
    lr.fill_(0.5)
    assert rates(opt) == pytest.approx([0.5, 0.03, 0.03, 0.03])
    assert rates(MuonSaI(net(), lr=torch.tensor(0.5), sai_lr=torch.tensor(0.25))) == [0.5, 0.25, 0.25, 0.25]
    assert rates(MuonSaI(net(), lr=torch.tensor(0.0), sai_lr=torch.tensor(0.25))) == [0.0, 0.25, 0.25, 0.25]
    assert rates(MuonSaI(net(), lr="0.5", sai_lr="0.25")) == [0.5, 0.25, 0.25, 0.25]
    for wrong in ("fast", -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Invalid (learning rate|rest_lr value)"):
            MuonSaI(net(), sai_lr=wrong)
        with pytest.raises(ValueError, match="Invalid (learning rate|lr value)"):
            MuonSaI(net(), lr=wrong, sai_lr=0.1)


def test_arguments_under_their_older_names():
    def groups(**settings):
        opt = MuonSaI(net(), lr=0.02, rest="sgd_sai", **settings)
        return [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]

    assert groups(sai_lr=0.3, sai_momentum=0.7) == groups(rest_lr=0.3, rest_momentum=0.7) != groups()
    with pytest.raises(TypeError, match="got rest_momentum and sai_momentum, which is its older name"):
        MuonSaI(net(), sai_momentum=0.7, rest_momentum=0.7)


@both
def test_a_group_that_brings_its_lr_has_that_rate(cls):
    groups = [
        {"params": [matrix()], "muon": True, "lr": 0.3},
        {"params": [vector()], "muon": False, "lr": 0.1},
        {"params": [vector()], "muon": False, "lr": 0.1, "lr_factor": 2.0},
        {"params": [vector()], "muon": False, "lr_factor": 0.5},
    ]
    assert rates(cls(groups, lr=0.02)) == pytest.approx([0.3, 0.1, 0.2, 0.01])


def test_a_rate_of_zero_by_its_factor_moves_nothing():
    model = net()
    opt, before = MuonSaI(model, lr=0.02, sai_lr=0.0, weight_decay=0.5), copy.deepcopy(model.state_dict())
    give_gradients(model, 0)
    opt.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(hidden_matrices(model))


# --- checkpoints ----------------------------------------------------------------------------------------------------


NEW_KEYS = "lr_factor stacked transposed split role rest adjust_lr ns_steps ns_coefficients".split()


def as_older_versions_wrote_it(state_dict):
    "Matrices, all else, and vectors, in this order; each group with a rate of its own and the keys of that time."
    old = copy.deepcopy(state_dict)
    groups = {}
    for group in old["param_groups"]:
        kind = {"matrix": "matrix", "vector": "vector"}.get(group["role"], "other")
        if kind in groups:
            for key in "params", "param_names":
                groups[kind][key] += group[key]
            continue
        group["lr"] = group["lr"] * group["lr_factor"]
        for key in NEW_KEYS:
            del group[key]
        groups[kind] = group
    old["param_groups"] = [groups[kind] for kind in ("matrix", "other", "vector")]
    return old


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_an_older_version_goes_on_to_the_last_bit(dtype):
    model = net().to(dtype)
    opt = MuonSaI(model, lr=0.02, rest="sgd_sai")
    for seed in range(3):
        give_gradients(model, seed)
        opt.step()
    file = io.BytesIO()
    torch.save(as_older_versions_wrote_it(opt.state_dict()), file)
    twin = copy.deepcopy(model)
    other = MuonSaI(twin, lr=1.0, sai_lr=7.0)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert [(group["lr"], group["lr_factor"], group["stacked"]) for group in other.param_groups] == [
        (0.02, 1.0, False),
        (0.03, 1.0, False),
        (0.03, 1.0, False),
        (0.03, 1.0, False),
    ]
    assert [group["rest"] for group in other.param_groups] == ["sgd_sai"] * 4
    schedule, other_schedule = (torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (opt, other))
    for seed in range(3, 6):
        give_gradients(model, seed), give_gradients(twin, seed)
        opt.step(), other.step(), schedule.step(), other_schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_checkpoint_with_a_factor_brings_it_along():
    opt, other = MuonSaI(net(), lr=0.02, sai_lr=0.1), MuonSaI(net(), lr=0.5)
    other.load_state_dict(opt.state_dict())
    assert rates(other) == rates(opt) == pytest.approx([0.02, 0.1, 0.1, 0.1])
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert rates(copied) == rates(opt)
        copied.add_param_group({"params": [("more", vector())], "muon": False})
        assert rates(copied)[-1] == pytest.approx(0.1)


def test_checkpoints_of_other_optimizers_are_refused():
    model = net()
    for of_another in (SGDSaI([{"params": [p]} for p in model.parameters()]), torch.optim.AdamW(model.parameters())):
        opt = MuonSaI([{"params": [p], "muon": p.ndim == 2} for p in model.parameters()])
        saved = of_another.state_dict()
        if len(saved["param_groups"]) == 1:
            saved["param_groups"] = [saved["param_groups"][0] | {"params": [i]} for i in range(8)]
        before = copy.deepcopy(opt.param_groups)
        with pytest.raises(ValueError, match="this checkpoint was written by"):
            opt.load_state_dict(saved)
        assert [g["muon"] for g in opt.param_groups] == [g["muon"] for g in before] and not opt.state


# --- the sorting ----------------------------------------------------------------------------------------------------


def three_layers(wrap, make=lambda: nn.Linear(4, 4)):
    return nn.Sequential(make(), wrap(make()), make())


def deprecated(wrap):
    def quietly(module, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wrap(module, **kwargs)

    return quietly


old_weight_norm, old_spectral_norm = deprecated(nn.utils.weight_norm), deprecated(nn.utils.spectral_norm)
LAYERS = {"linear": lambda: nn.Linear(4, 4), "convolution": lambda: nn.Conv2d(4, 4, 3)}
WRAPPED = {
    "weight_norm, old": (old_weight_norm, "1.weight_v", "1.weight_g"),
    "weight_norm": (
        parametrizations.weight_norm,
        "1.parametrizations.weight.original1",
        "1.parametrizations.weight.original0",
    ),
    "weight_norm, other dimension": (
        lambda module: parametrizations.weight_norm(module, dim=1),
        "1.parametrizations.weight.original1",
        "1.parametrizations.weight.original0",
    ),
    "weight_norm, old, of all": (lambda module: old_weight_norm(module, dim=None), "1.weight_v", "1.weight_g"),
    "spectral_norm, old": (old_spectral_norm, "1.weight_orig", None),
    "spectral_norm": (parametrizations.spectral_norm, "1.parametrizations.weight.original", None),
    "orthogonal": (parametrizations.orthogonal, "1.parametrizations.weight.original", None),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_weights_that_are_kept_in_parts(wrapped, layer):
    wrap, direction, gain = WRAPPED[wrapped]
    model = three_layers(wrap, LAYERS[layer])
    names = dict(model.named_parameters())
    assert hidden_matrices(model) == [direction] and (gain is None or gain in names)
    opt = MuonSaI(model, rest="sgd_sai")
    x = torch.randn(2, 4) if layer == "linear" else torch.randn(2, 4, 8, 8)
    for _ in range(2):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert set(opt.state[names[direction]]) == {"momentum_buffer"}
    if gain is not None:
        assert "gsnr" in opt.state[names[gain]]


def test_parts_of_first_last_and_embedded_weights_are_left_to_the_rest():
    wrap = parametrizations.weight_norm
    assert hidden_matrices(nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 4), wrap(nn.Linear(4, 2)))) == ["1.weight"]
    embedded = nn.Sequential(wrap(nn.Embedding(9, 4)), nn.Linear(4, 4), nn.Linear(4, 9))
    assert hidden_matrices(embedded) == ["1.weight"]
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(1, 4), nn.Linear(4, 4))
    assert hidden_matrices(plain) == ["1.weight", "2.weight"]  # a whole weight is one, however narrow


class Experts(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def marks(model, **kwargs):
    return {
        name: group.get("stacked", False)
        for group in muon_groups(model, **kwargs)
        for name, _ in group["params"]
        if group["muon"]
    }


def test_the_kind_of_layer_decides_what_is_a_stack():
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.Conv1d(4, 4, 3),
        nn.ConvTranspose1d(4, 4, 3),
        parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
        Experts(3, 4, 4),
        nn.Bilinear(4, 4, 4),
        nn.Conv2d(4, 4, 3),
        nn.Conv3d(4, 4, 3),
        Experts(2, 2, 4, 4),
        nn.Linear(4, 4),
        nn.Linear(4, 4),
    )
    stacks = {"4.weight", "5.weight"}
    found = marks(model)
    assert {name for name, stacked in found.items() if stacked} == stacks
    assert set(found) - stacks == {
        "1.weight",
        "2.weight",
        "3.parametrizations.weight.original1",
        "6.weight",
        "7.weight",
        "8.weight",
        "9.weight",
    }
    assert marks(model, matrices=lambda name, p: name in ("1.weight", "4.weight")) == {
        "1.weight": False,
        "4.weight": True,
    }
    opt = MuonSaI(model)
    assert [(group["role"], group["stacked"], group["transposed"]) for group in opt.param_groups] == [
        ("matrix", False, False),
        ("matrix", False, True),
        ("matrix", True, False),
        ("embedding", False, False),
        ("head", False, False),
        ("vector", False, False),
    ]
    give_gradients(model, 0)
    opt.step()


def test_each_role_has_a_group_and_vectors_do_not_decay():
    assert [(group["muon"], group["role"], group.get("weight_decay")) for group in muon_groups(net())] == [
        (True, "matrix", None),
        (False, "embedding", None),
        (False, "head", None),
        (False, "vector", 0.0),
    ]


def test_a_pickle_of_an_older_version_keeps_the_rate_and_the_momentum_of_its_rest():
    opt = MuonSaI(net(), lr=0.02, rest_lr=0.1, rest_momentum=0.7)
    state = {key: value for key, value in opt.__getstate__().items() if key not in ("rest_options", "reasons")}
    state["sgd_sai_defaults"] = {"lr_factor": 5.0, "muon": False, "momentum": 0.7, "nesterov": False}
    given, older = dict(state), MuonSaI.__new__(MuonSaI)
    older.__setstate__(state)
    assert state == given  # what was given is left alone
    older.add_param_group({"params": [("more", vector())], "muon": False})
    assert rates(older)[-1] == pytest.approx(0.1) and older.param_groups[-1]["momentum"] == 0.7
    assert older.param_groups[-1]["rest"] == "sgd_sai" and older.role_table()[-1].why == "its group says so"


def test_a_checkpoint_of_an_older_version_whose_groups_do_not_fit_is_refused():
    model = net()
    opt = MuonSaI(model)
    old = as_older_versions_wrote_it(opt.state_dict())
    names = [group["param_names"] for group in old["param_groups"]]
    names[0][0], names[2][0] = names[2][0], names[0][0]  # a matrix among the vectors, a vector among the matrices
    before = copy.deepcopy(opt.param_groups)
    with pytest.raises(
        ValueError, match="older version of MuonSaI, which sorted .* apart: give the optimizer the groups"
    ):
        opt.load_state_dict(old)
    assert not opt.state and [group["param_names"] for group in opt.param_groups] == [g["param_names"] for g in before]
