"Options that come as text, from command lines and YAML files, and values that no option can have."

import math

import pytest
import torch
from torch import nn

from sgd_sai.adahessian import AdaHessian
from sgd_sai.adan import Adan
from sgd_sai.internals.options import parse_option
from sgd_sai.muon_sai import MuonSaI
from sgd_sai.sgd_sai import SGD_sai, SGDSaI

pytestmark = [pytest.mark.usefixtures("seeded")]


def muon(params, **options):
    return MuonSaI([{"params": params, "muon": True}], **options)


BUILD = {"SGDSaI": SGDSaI, "SGD_sai": SGD_sai, "MuonSaI": muon, "Adan": Adan, "AdaHessian": AdaHessian}
TEXTS = {  # option: text, value
    "lr": ("1e-2", 0.01),
    "weight_decay": (" 0.1 ", 0.1),
    "eps": ("1e-6", 1e-6),
    "momentum": ("0.8", 0.8),
    "nesterov": ("true", True),
    "maximize": ("False", False),
    "foreach": ("none", None),
    "max_ratio": ("null", None),
    "state_dtype": ("bfloat16", torch.bfloat16),
    "betas": ("0.9, 0.99", (0.9, 0.99)),
    "restart_radius": ("2", 2),
    "no_prox": ("yes", True),
    "n_samples": ("3", 3),
    "average_window": ("off", False),
    "rounding": ("nearest", "nearest"),
    "capturable": ("true", True),
    "ns_steps": ("7", 7),
    "ns_coefficients": ("polar_express", "polar_express"),
    "adjust_lr": ("match_rms_adamw", "match_rms_adamw"),
}
CHOICES = {
    "SGDSaI": "lr weight_decay eps momentum nesterov maximize foreach max_ratio state_dtype",
    "SGD_sai": "lr weight_decay eps momentum",
    "MuonSaI": "lr weight_decay eps momentum nesterov maximize foreach max_ratio state_dtype rounding capturable "
    "ns_steps ns_coefficients adjust_lr",
    "Adan": "lr weight_decay eps maximize foreach state_dtype restart_radius no_prox",
    "AdaHessian": "lr weight_decay eps maximize state_dtype betas n_samples average_window",
}


@pytest.mark.parametrize("name, option", [(n, option) for n, words in CHOICES.items() for option in words.split()])
def test_text_is_the_value_that_it_says(name, option):
    text, value = TEXTS[option]
    opt = BUILD[name]([nn.Parameter(torch.randn(3, 2))], **{option: text})
    assert opt.param_groups[0][option] == value and type(opt.param_groups[0][option]) is type(value)


@pytest.mark.parametrize("name", BUILD)
def test_text_in_a_group_is_understood_too(name):
    opt = BUILD[name]([nn.Parameter(torch.randn(3, 2))])
    late = {"params": [nn.Parameter(torch.randn(3, 2))], "lr": "0.5", "maximize": "true"}
    opt.add_param_group(late | ({"muon": "true"} if name == "MuonSaI" else {}))
    assert opt.param_groups[1]["lr"] == 0.5 and opt.param_groups[1]["maximize"] is True
    if name == "MuonSaI":
        assert opt.param_groups[1]["muon"] is True


WRONG = {
    "lr": ["fast", "", None, [0.1], "1e999", "nan", math.inf, math.nan, {}],
    "weight_decay": ["much", None, "-1", "inf"],
    "eps": ["small", None],
    "maximize": ["maybe", "2", 0.5, None, "none"],
    "state_dtype": ["bfloat61", "Tensor", 16, int, "int64"],
    "momentum": ["1.5", "heavy", None],
    "betas": ["0.9", "0.9, b", 0.9, None, "0.9, 1.1"],
    "n_samples": ["2.5", "few", 0, 1.5],
    "rounding": ["up", 3],
    "scale": ["gsnrr", 3, None],
    "max_ratio": ["wide", "0.5"],
    "ns_steps": ["few", 0, -1, 2.5, 100],
    "ns_coefficients": ["newton", "1, 2, 3, 4", (1.0, 2.0), [(1.0, 2.0, "a")]],
    "adjust_lr": ["rms", None, 3],
}
WRONG_CHOICES = {
    "SGDSaI": "lr weight_decay eps maximize state_dtype momentum rounding scale max_ratio",
    "SGD_sai": "lr weight_decay eps momentum",
    "MuonSaI": "lr weight_decay eps maximize momentum scale max_ratio state_dtype rounding ns_steps ns_coefficients "
    "adjust_lr",
    "Adan": "lr weight_decay eps maximize state_dtype betas",
    "AdaHessian": "lr weight_decay eps maximize state_dtype betas n_samples",
}
WORDS = {"lr": "lr|learning rate", "eps": "eps", "betas": "betas?", "scale": "scale"}


@pytest.mark.parametrize("name, option", [(n, option) for n in WRONG_CHOICES for option in WRONG_CHOICES[n].split()])
def test_what_an_option_cannot_be_is_an_error_with_its_name(name, option):
    for value in WRONG[option]:
        with pytest.raises(ValueError, match=WORDS.get(option, option)):
            BUILD[name]([nn.Parameter(torch.randn(3, 2))], **{option: value})
        opt = BUILD[name]([nn.Parameter(torch.randn(3, 2))])
        with pytest.raises(ValueError, match=WORDS.get(option, option)):
            mark = {"muon": True} if name == "MuonSaI" else {}
            opt.add_param_group({"params": [nn.Parameter(torch.randn(3, 2))], option: value} | mark)
        assert len(opt.param_groups) == 1


@pytest.mark.parametrize("name", BUILD)
def test_default_out_of_range_is_refused_though_no_group_uses_it(name):
    group = {"params": [nn.Parameter(torch.randn(3, 2))], "lr": 0.1} | ({"muon": True} if name == "MuonSaI" else {})
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        (MuonSaI if name == "MuonSaI" else BUILD[name])([group], lr=-1.0)


@pytest.mark.parametrize("text", ["bfloat16", "torch.bfloat16", "bf16", " BFloat16 "])
def test_spellings_of_a_dtype(text):
    assert parse_option("state_dtype", text) is torch.bfloat16


def test_whole_numbers_stay_whole_and_tensors_stay_tensors():
    assert parse_option("lr", "2") == 2 and type(parse_option("lr", "2")) is int
    lr = torch.tensor(0.1)
    assert parse_option("lr", lr) is lr
    assert parse_option("seed", 3.0) == 3 and type(parse_option("seed", 3.0)) is int
    assert parse_option("comment", "0.1") == "0.1"  # what no optimizer has is left alone


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "bfloat16", torch.float64, torch.int8])
def test_fused_with_another_momentum_dtype_is_refused_at_construction(state_dtype):
    with pytest.raises(RuntimeError, match="fused.*state_dtype"):
        SGDSaI([nn.Parameter(torch.randn(3, 2))], fused=True, state_dtype=state_dtype)
    opt = SGDSaI([nn.Parameter(torch.randn(3, 2))], fused=True)
    with pytest.raises(RuntimeError, match="fused.*state_dtype"):
        opt.add_param_group({"params": [nn.Parameter(torch.randn(3, 2))], "state_dtype": state_dtype})
    assert len(opt.param_groups) == 1


def test_fused_with_the_dtype_of_the_parameters_is_what_it_says():
    p = nn.Parameter(torch.randn(3, 2, dtype=torch.bfloat16))
    opt = SGDSaI([p], fused=True, state_dtype=torch.bfloat16)
    p.grad = torch.randn_like(p)
    before = p.detach().clone()
    opt.step()
    assert not torch.equal(p, before)


def adam_groups():
    matrix, vector = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    return [{"params": [matrix], "use_muon": True}, {"params": [vector], "use_muon": False, "betas": (0.9, 0.95)}]


def unmarked_group():
    opt = muon([nn.Parameter(torch.ones(3, 2))])
    return lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(3, 2))]})


def constant_gradient():
    p = nn.Parameter(torch.ones(3))
    opt = AdaHessian([p])
    p.sum().backward(create_graph=True)
    return opt.step


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    "build, word",
    [
        (lambda: lambda: MuonSaI(adam_groups()), "written for Adam"),
        (lambda: lambda: MuonSaI(nn.Linear(3, 2)), "no hidden matrix"),
        (unmarked_group, "neither muon=True nor muon=False"),
        (constant_gradient, "is constant"),
    ],
    ids=["Adam's group", "no matrix", "no mark", "constant gradient"],
)
def test_warnings_point_at_the_line_that_calls(build, word):
    call = build()
    with pytest.warns(UserWarning, match=word) as caught:
        call()
    assert [w.filename for w in caught if word in str(w.message)] == [__file__]
