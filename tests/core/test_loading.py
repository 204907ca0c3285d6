"Loading a checkpoint: state of another shape, dtype or optimizer is refused before anything changes; names decide."

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, RMSprop

import sgd_sai.init_scales
from sgd_sai.adahessian import AdaHessian
from sgd_sai.adan import Adan
from sgd_sai.muon_sai import MuonSaI
from sgd_sai.sgd_sai import SGD_sai, SGDSaI

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]


def muon(params, **options):
    "MuonSaI from named parameters: matrices in one group, the rest in another."
    params = list(params)
    groups = [{"params": [(n, p) for n, p in params if (p.ndim >= 2) == flag], "muon": flag} for flag in (True, False)]
    return MuonSaI([group for group in groups if group["params"]], **options)


OPTIMIZERS = {
    "SGDSaI": SGDSaI,
    "SGDSaI int8": lambda params: SGDSaI(params, state_dtype=torch.int8),
    "SGDSaI kahan": lambda params: SGDSaI(params, rounding="kahan"),
    "SGDSaI capturable": lambda params: SGDSaI(params, capturable=True),
    "SGD_sai": SGD_sai,
    "MuonSaI": muon,
    "MuonSaI int8": lambda params: muon(params, state_dtype=torch.int8),
    "MuonSaI capturable": lambda params: muon(params, capturable=True),
    "MuonSaI sign": lambda params: muon(params, rest="sign"),
    "MuonSaI row_norm": lambda params: muon(params, rest="row_norm"),
    "MuonSaI adams, kahan": lambda params: muon(params, rest="adams", rounding="kahan"),
    "Adan": Adan,
    "Adan restarts": lambda params: Adan(params, restart_radius=1.0),
    "AdaHessian": AdaHessian,
}
each_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
CLASSES = {"SGDSaI": SGDSaI, "MuonSaI": muon, "Adan": Adan, "AdaHessian": AdaHessian}
each_class = pytest.mark.parametrize("build", CLASSES.values(), ids=CLASSES)


def small_model(rows=8, cols=6, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(cols, rows), nn.Tanh(), nn.Linear(rows, 3)).to(dtype)


def backward(model, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(16, model[0].in_features, dtype=model[0].weight.dtype)
    model.zero_grad()
    model(x).square().mean().backward(create_graph=True)


def trained(build, model, n=2):
    opt = build(model.named_parameters())
    for seed in range(n):
        backward(model, seed)
        opt.step()
    return opt


def snapshot(opt):
    "Everything that loading could change, as a copy that compares by value."
    return pickle.dumps([opt.state_dict(), [group["params"] for group in opt.param_groups], opt.defaults])


def assert_refused(opt, checkpoint, *parts, error=ValueError):
    "Loading raises, with these words, and changes nothing."
    before = snapshot(opt)
    with pytest.raises(error) as caught:
        opt.load_state_dict(checkpoint)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    assert snapshot(opt) == before


def param_shaped(state):
    return [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.ndim > 1]


# --- state of another shape ------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("rows", [5, 11], ids=["grown", "shrunk"])
def test_state_of_another_shape_is_refused(build, rows):
    checkpoint = trained(build, small_model(rows)).state_dict()
    opt = trained(build, small_model(8))
    # the first parameter in the order of the groups that differs
    assert_refused(opt, checkpoint, "0.weight", str((rows, 6)), str((8, 6)))
    backward(model := small_model(rows))
    fitting = build(model.named_parameters())
    fitting.load_state_dict(checkpoint)  # the same file, where it belongs
    fitting.step()


@each_optimizer
def test_state_of_equal_size_and_another_shape_is_refused(build):
    checkpoint = trained(build, small_model()).state_dict()
    opt = trained(build, small_model())
    wrong = copy.deepcopy(checkpoint)
    for i, state in wrong["state"].items():
        for key in param_shaped(state):
            wrong["state"][i][key] = state[key].T.contiguous()
    assert_refused(opt, wrong, "0.weight", "(6, 8)", "(8, 6)")


@each_optimizer
def test_state_whose_entries_share_their_memory_is_refused(build):
    opt = trained(build, small_model())
    for key in param_shaped(opt.state[opt.param_groups[0]["params"][0]]):
        wrong = copy.deepcopy(opt.state_dict())
        state = wrong["state"][wrong["param_groups"][0]["params"][0]]
        state[key] = state[key][:1].expand_as(state[key])
        assert_refused(opt, wrong, "0.weight", key, "expanded")


def test_state_of_an_empty_tensor_may_have_strides_of_zero():
    p = nn.Parameter(torch.empty(0, 0, 0, 2).contiguous(memory_format=torch.channels_last))
    opt = SGDSaI([p, nn.Parameter(torch.ones(3))])
    for param in opt.param_groups[0]["params"]:
        param.grad = torch.randn_like(param)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    assert 0 in saved["state"][0]["momentum_buffer"].stride()
    opt.load_state_dict(saved)


@each_optimizer
@pytest.mark.parametrize("damage", ["integers", "complex", "None", "text", "a list", "sparse", "no dictionary"])
def test_state_that_is_no_momentum_is_refused(build, damage):
    opt = trained(build, small_model())
    wrong = copy.deepcopy(opt.state_dict())
    i = next(i for i, state in wrong["state"].items() if param_shaped(state))
    state = wrong["state"][i]
    for key in param_shaped(state):
        value = state[key].float()
        state[key] = {
            "integers": value.to(torch.int64),
            "complex": value.to(torch.complex64),
            "None": None,
            "text": "momentum",
            "a list": value.tolist(),
            "sparse": value.to_sparse(),
        }.get(damage, value)
    if damage == "no dictionary":
        wrong["state"][i] = [0.0]
    assert_refused(opt, wrong, "0.weight")


def test_eight_bit_momentum_needs_a_scale_for_every_block():
    opt = trained(OPTIMIZERS["SGDSaI int8"], small_model(40, 20))
    good = opt.state_dict()
    assert len(good["state"][0]["momentum_absmax"]) == 4  # 800 entries in blocks of 256
    for absmax, word in (
        (None, "missing"),
        (torch.ones(3), "(3,)"),
        (torch.ones(5), "(5,)"),
        (torch.tensor([1.0, math.nan, 1.0, 1.0]), "no scales"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), "no scales"),
        (torch.tensor([1.0, math.inf, 1.0, 1.0]), "no scales"),
        ("one", "momentum_absmax"),
    ):
        for dtype in (torch.int8, torch.bfloat16):  # kept as it is, or decoded
            wrong = copy.deepcopy(good)
            wrong["param_groups"][0]["state_dtype"] = dtype
            wrong["state"][0]["momentum_absmax"] = absmax
            if absmax is None:
                del wrong["state"][0]["momentum_absmax"]
            assert_refused(opt, wrong, "0.weight", "momentum_absmax", word)


@pytest.mark.parametrize("scale", ["3.5", "large", None, [2.0], torch.ones(2), torch.tensor(1j)], ids=str)
def test_scale_that_is_no_number_is_refused(scale):
    opt = trained(SGDSaI, small_model())
    wrong = copy.deepcopy(opt.state_dict())
    wrong["state"][2]["gsnr"] = scale
    assert_refused(opt, wrong, "2.weight", "gsnr")


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, -math.inf, math.nan, torch.tensor(math.inf)], ids=str)
@pytest.mark.parametrize("capturable", [False, True])
def test_scale_that_cannot_be_used_is_not_kept_and_is_measured_anew(scale, capturable):
    model = small_model()
    opt = trained(lambda params: SGDSaI(params, capturable=capturable), model)
    right = opt.scales()
    damaged = copy.deepcopy(opt.state_dict())
    damaged["state"][2]["gsnr"] = scale
    opt.load_state_dict(damaged)
    assert list(opt.scales()) == ["0.weight", "0.bias", "2.bias"] and model[2].weight not in opt.state
    backward(model)
    opt.step()
    assert opt.scales().keys() == right.keys() and 0 < opt.scales()["2.weight"] < math.inf
    assert {name: opt.scales()[name] for name in ("0.weight", "0.bias", "2.bias")} == {
        name: right[name] for name in ("0.weight", "0.bias", "2.bias")
    }


@pytest.mark.parametrize("build", [Adan, AdaHessian])
@pytest.mark.parametrize("count", ["many", None, torch.ones(2), math.nan, -1.0, math.inf], ids=str)
def test_step_count_that_is_no_number_is_refused(build, count):
    opt = trained(build, small_model())
    wrong = copy.deepcopy(opt.state_dict())
    wrong["state"][1]["step"] = count
    assert_refused(opt, wrong, "0.bias")


@each_class
@pytest.mark.parametrize(
    "change",
    [dict(lr=math.nan), dict(lr=-1.0), dict(lr="fast"), dict(lr=None), dict(lr=math.inf), dict(weight_decay="much")],
    ids=str,
)
def test_group_with_a_hyperparameter_out_of_range_is_refused(build, change):
    opt = trained(build, small_model())
    wrong = copy.deepcopy(opt.state_dict())
    wrong["param_groups"][-1].update(change)
    assert_refused(opt, wrong, next(iter(change)) if "weight_decay" in change else "")


@each_class
def test_error_in_the_last_parameter_leaves_the_first_ones_alone(build):
    opt = trained(build, small_model())
    wrong = copy.deepcopy(trained(build, small_model(), 4).state_dict())
    key = "momentum_buffer" if "momentum_buffer" in wrong["state"][3] else "exp_avg"
    wrong["state"][3][key] = torch.ones(2)
    assert_refused(opt, wrong, "2.bias", "(2,)", "(3,)")


@each_class
@pytest.mark.parametrize("given", [{}, {"state": {}}, [], None, "checkpoint"], ids=str)
def test_what_is_no_checkpoint_is_refused(build, given):
    opt = trained(build, small_model())
    assert_refused(opt, given, "state_dict")
    assert_refused(opt, small_model().state_dict(), "state_dict", "param_groups")


# --- other optimizers ------------------------------------------------------------------------------------------------


FOREIGN = {
    "torch.optim.Adam or AdamW": lambda params: AdamW(params, lr=1e-3),
    "torch.optim.SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "torch.optim.RMSprop": lambda params: RMSprop(params, lr=1e-3, momentum=0.9),
    "sgd_sai.SGDSaI": SGDSaI,
    "sgd_sai.Adan": Adan,
    "sgd_sai.AdaHessian": AdaHessian,
}


@each_class
@pytest.mark.parametrize("writer", FOREIGN)
@pytest.mark.parametrize("n", [0, 2], ids=["before its first step", "after two"])
def test_checkpoint_of_another_optimizer_is_refused_by_name(build, writer, n):
    theirs = trained(FOREIGN[writer], small_model(), n)
    opt = trained(build, small_model())
    if isinstance(opt, type(theirs)):
        opt.load_state_dict(theirs.state_dict())
        return
    checkpoint = theirs.state_dict()
    if isinstance(opt, MuonSaI):  # as many groups
        checkpoint = copy.deepcopy(checkpoint)
        (group,) = checkpoint["param_groups"]
        checkpoint["param_groups"] = [
            group | {"params": ids, "param_names": [group["param_names"][i] for i in ids]} for ids in ([0, 2], [1, 3])
        ]
    assert_refused(opt, checkpoint, writer, type(opt).__name__, "start the optimizer anew")


@pytest.mark.parametrize("build", [SGDSaI, SGD_sai])
def test_checkpoint_of_madgrad_is_refused_though_its_groups_are_like_those_of_the_authors(build):
    opt = trained(build, small_model())
    params = [p for group in opt.param_groups for p in group["params"]]
    keys = ("grad_sum_sq", "s", "x0")
    states = {i: {key: torch.zeros_like(p) for key in keys} for i, p in enumerate(params)}
    group = dict(lr=0.01, eps=1e-6, momentum=0.9, weight_decay=0.0, params=list(states))
    checkpoint = {"state": states | {"k": torch.tensor([2])}, "param_groups": [group]}
    assert_refused(opt, checkpoint, "eps, lr, momentum, weight_decay", "start the optimizer anew")
    opt.load_state_dict({"state": {0: {"gsnr": 2.0}}, "param_groups": [group]})  # the authors', without a momentum yet
    assert list(opt.scales().values()) == [2.0]


def test_checkpoint_of_muon_sai_is_refused_by_sgd_sai():
    theirs = trained(muon, small_model())
    model = small_model()
    opt = SGDSaI([{"params": [p for p in model.parameters() if p.ndim == d]} for d in (2, 1)])
    assert_refused(opt, theirs.state_dict(), "sgd_sai.MuonSaI")


def test_refusal_does_not_depend_on_the_dtype_of_the_state():
    theirs = trained(FOREIGN["torch.optim.Adam or AdamW"], small_model())
    opt = SGDSaI(small_model().named_parameters(), state_dtype=torch.bfloat16)
    assert_refused(opt, theirs.state_dict(), "AdamW")


# --- state under a key that is no parameter -------------------------------------------------------------------------


@each_class
def test_state_under_a_key_that_is_no_parameter_travels(build):
    model = small_model()
    opt = trained(build, model)
    opt.state["k"] = torch.tensor([7])
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert twin.state["k"].item() == 7
    other = build(small_model().named_parameters())
    other.load_state_dict(opt.state_dict())
    assert other.state["k"].item() == 7 and len(other.state) == 5
    backward(model)
    opt.step()
    if isinstance(opt, (SGDSaI, MuonSaI)):
        opt.scales()
    if isinstance(opt, Adan):
        opt.restart()
        assert list(opt.state) == ["k"]


def test_normalize_looks_at_the_parameters_alone():
    models, opts = [small_model(), small_model()], []
    for model in models:
        opts.append(SGDSaI(model.named_parameters(), normalize=True, lr=1.0))
    opts[1].state["k"] = torch.tensor([1e9])
    opts[1].state["gsnr"] = {"gsnr": 1e9}
    for model, opt in zip(models, opts, strict=True):
        backward(model)
        opt.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


# --- names -----------------------------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_names_decide_which_state_is_whose(build, prefix):
    model = small_model(rows=6, cols=6)
    opt = trained(build, model)
    twin = small_model(rows=6, cols=6)
    twin.load_state_dict(model.state_dict())
    order = [3, 1, 2, 0]
    named = list(twin.named_parameters())
    other = build([(prefix + named[i][0], named[i][1]) for i in order])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(opt.state_dict())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert opt.state[p].keys() == other.state[q].keys()
        for key, value in opt.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][key])), (name, key)
    assert sorted(name for name, _ in other.named()) == sorted(prefix + name for name, _ in named)


@each_class
def test_names_that_do_not_tell_are_named_in_a_warning(build):
    opt = trained(build, small_model())
    model = small_model()
    other = build([(f"net.{name}", p) for name, p in model.named_parameters()])
    with pytest.warns(UserWarning, match=r"'0.weight' there, 'net.0.weight' here.*by position") as caught:
        other.load_state_dict(opt.state_dict())
    assert [w.filename for w in caught] == [__file__]  # it points at the line that loads
    for p, q in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert opt.state[p].keys() == other.state[q].keys()
        for key, value in opt.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][key])), key
    assert [name for name, _ in other.named()][0] == "net.0.weight"


def test_equal_names_in_another_order_cannot_tell():
    model = small_model(rows=6, cols=6)
    pairs = [("a", model[0].weight), ("b", model[2].bias), ("a", model[0].bias)]
    opt = SGDSaI(pairs)
    backward(model)
    opt.step()
    other = SGDSaI([("b", model[2].bias), ("a", model[0].weight), ("a", model[0].bias)])
    with pytest.warns(UserWarning, match="do not tell"), pytest.raises(ValueError, match="momentum_buffer"):
        other.load_state_dict(opt.state_dict())  # by position: a matrix for a bias
    assert not other.state


def test_position_of_a_parameter_that_joined_later():
    first, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    opt = SGDSaI([first])
    assert opt.position(first) == 0
    opt.add_param_group({"params": [late]})
    assert (opt.position(first), opt.position(late)) == (0, 1)
    twin = copy.deepcopy(opt)
    assert [twin.position(p) for group in twin.param_groups for p in group["params"]] == [0, 1]


@each_class
def test_names_of_one_side_alone_change_nothing(build):
    if build is muon:
        pytest.skip("the helper names its parameters")
    opt = trained(build, small_model())
    other = build(small_model().parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(opt.state_dict())
    assert [name for name, _ in other.named()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_state_moves_between_groups_with_its_name():
    model = small_model(rows=6, cols=6)
    opt = SGDSaI([{"params": list(model[0].named_parameters("0"))}, {"params": list(model[2].named_parameters("2"))}])
    backward(model)
    opt.step()
    other = SGDSaI(
        [{"params": list(model[2].named_parameters("2"))}, {"params": list(model[0].named_parameters("0")), "lr": 1.0}]
    )
    other.load_state_dict(opt.state_dict())
    assert other.scales() == opt.scales()
    assert torch.equal(other.state[model[0].weight]["momentum_buffer"], opt.state[model[0].weight]["momentum_buffer"])


def two_models():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6)), nn.Sequential(nn.Linear(6, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_two_models_with_equal_names_keep_their_scales_apart(groups):
    G, D = two_models()
    pairs = [*G.named_parameters()], [*D.named_parameters()]
    opt = SGDSaI(pairs[0] + pairs[1] if groups == 1 else [{"params": some} for some in pairs])
    D(G(torch.randn(8, 4))).square().mean().backward()
    opt.step()
    names = ["0.weight (#0)", "0.bias (#1)", "0.weight (#2)", "0.bias (#3)"]
    assert list(opt.scales()) == names and len(set(opt.scales().values())) == 4
    opt.set_scales({"0.weight (#2)": 2.0, "0.bias (#1)": 3.0})
    assert opt.state[D[0].weight]["gsnr"] == 2.0 and opt.state[G[0].bias]["gsnr"] == 3.0
    before = opt.scales()
    with pytest.raises(KeyError, match=r"several parameters.*'0.weight \(#0\)', '0.weight \(#2\)'"):
        opt.set_scales({"0.bias (#1)": 9.0, "0.weight": 2.0})
    assert opt.scales() == before
    assert opt.name_of(D[0].weight) == "0.weight (#2)"


def test_scales_by_name_understand_wrapped_models():
    model = small_model()
    opt = SGDSaI([(f"module._orig_mod.{name}", p) for name, p in model.named_parameters()])
    opt.set_scales({"0.weight": 5.0, "module.2.bias": 6.0})
    assert opt.scales() == {"module._orig_mod.0.weight": 5.0, "module._orig_mod.2.bias": 6.0}
    plain = SGDSaI(model.named_parameters())
    plain.set_scales(opt.scales())
    assert plain.scales() == {"0.weight": 5.0, "2.bias": 6.0}


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("known", [False, True], ids=["without state", "with state"])
def test_scales_are_set_all_or_none(wrong, known):
    model = small_model()
    opt = trained(SGDSaI, model) if known else SGDSaI(model.named_parameters())
    before = snapshot(opt)
    for last in ({"2.bias": wrong}, {"2.tail": 1.0}):
        with pytest.raises((KeyError, ValueError), match=next(iter(last))):
            opt.set_scales({"0.weight": 5.0} | last)
        assert snapshot(opt) == before and len(opt.state) == 4 * known


# --- copies and clocks -----------------------------------------------------------------------------------------------


@each_class
def test_copy_without_a_hyperparameter_gets_its_default(build):
    opt = trained(build, small_model())
    state = opt.__getstate__()
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        del group["maximize"]
    old = type(opt).__new__(type(opt))
    old.__setstate__(state)
    assert all(group["maximize"] is False for group in old.param_groups)


def test_processes_are_compared_anew_after_loading(monkeypatch):
    compared, check = [], sgd_sai.init_scales._check_same_everywhere
    monkeypatch.setattr(sgd_sai.init_scales, "_check_same_everywhere", lambda *args: (compared.append(1), check(*args)))
    model = small_model()
    opt = SGDSaI(model.named_parameters())
    for load in (False, False, True, False):
        if load:
            opt.load_state_dict(opt.state_dict())
        backward(model)
        opt.step()
        compared.append(0)
    assert compared == [1, 0, 0, 1, 0, 0]  # before the first step, and before the first one after loading


def test_blank_scales_do_not_survive_a_copy():
    model = small_model()
    opt = SGDSaI(model.named_parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()  # as torch.distributed.checkpoint does, to see which state there is
    assert len(opt.state) == 4
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert not twin.state
    blank = opt.state_dict()
    other = SGDSaI(small_model().named_parameters())
    other.load_state_dict(blank)
    assert not other.state


@pytest.mark.parametrize("build", [Adan, SGDSaI])
@pytest.mark.parametrize("capturable", [False, True])
def test_capturable_numbers_are_where_the_parameter_is(build, capturable):
    p = nn.Parameter(torch.ones(3, 2, device="meta"))
    q = nn.Parameter(torch.ones(3, 2))
    there, here = build([("p", p)], capturable=capturable), build([("p", q)], capturable=capturable)
    q.grad = torch.randn(3, 2)
    here.step()
    there.load_state_dict(here.state_dict())
    key = "step" if build is Adan else "gsnr"
    device = getattr(there.state[p][key], "device", None)
    assert device == (torch.device("meta") if capturable else torch.device("cpu") if build is Adan else None)
    there.load_state_dict(here.state_dict())
    back = build([("p", q)], capturable=capturable)
    back.load_state_dict(here.state_dict())
    assert float(back.state[q][key]) == float(here.state[q][key])
