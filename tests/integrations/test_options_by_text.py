"""Programs that import an optimizer by its dotted name and have its options as text.

sd-scripts reads `--optimizer_args` as Python literals, so that a word needs quotes of its own; Axolotl and Trainer's
`optim_args` split at commas and leave everything text."""

import ast
import importlib

import pytest
import torch
from programs import HIDDEN, SETTINGS, Net, assert_same, plain, train, trainable

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI

each_class = pytest.mark.parametrize("cls", [SGDSaI, Adan, AdaHessian], ids=lambda cls: cls.__name__)


def literals(*arguments):
    "`key=value` each, the value a Python literal."
    pairs = (argument.split("=") for argument in arguments)
    return {key: ast.literal_eval(value) for key, value in pairs}


def texts(line):
    "`key=value,key=value`, the values left text."
    return dict(pair.split("=") for pair in line.replace(" ", "").split(","))


def by_name(dotted, params, **options):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)(params, **options)


def adapter_groups(model):
    "Groups as sd-scripts makes them of a network: views of the values of a dictionary, each group with its rate."
    named = dict(trainable(model))
    up = {name: p for name, p in named.items() if name.startswith("up")}
    rest = {name: p for name, p in named.items() if name not in up}
    return [dict(params=up.values(), lr=0.02), dict(params=rest.values(), lr=0.01)]


@each_class
def test_groups_and_literals(cls):
    "Rates of the groups, options as literals: as if they were given in Python."
    options = literals("weight_decay=0.1", "state_dtype='float32'", "maximize=False")
    model = Net()
    opt = by_name(f"sgd_sai.{cls.__name__}", adapter_groups(model), lr=0.5, **options)
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.01]
    train(model, opt)
    expected = dict(weight_decay=0.1, state_dtype=torch.float32, maximize=False)
    assert_same(model, plain(lambda model: cls(adapter_groups(model), **expected)))


@pytest.mark.parametrize(
    "cls, line, expected",
    [
        (
            SGDSaI,
            "lr=0.01, weight_decay=1e-2, nesterov=true, state_dtype=bfloat16, rounding=nearest, max_ratio=none",
            dict(
                lr=0.01,
                weight_decay=1e-2,
                nesterov=True,
                state_dtype=torch.bfloat16,
                rounding="nearest",
                max_ratio=None,
            ),
        ),
        (Adan, "lr=0.01, eps=1e-6, no_prox=True", dict(lr=0.01, eps=1e-6, no_prox=True)),
        (
            AdaHessian,
            "lr=0.05, update_period=2, hessian_power=0.5, average_window=off",
            dict(lr=0.05, update_period=2, hessian_power=0.5, average_window=False),
        ),
    ],
    ids=["SGDSaI", "Adan", "AdaHessian"],
)
def test_everything_is_text(cls, line, expected):
    "Numbers, switches, dtypes, words: the training of the same options in Python."
    model = Net()
    opt = by_name(f"sgd_sai.{cls.__name__}", model.parameters(), **texts(line))
    assert {key: opt.param_groups[0][key] for key in expected} == expected
    train(model, opt)
    assert_same(model, plain(lambda model: cls(model.parameters(), **expected)))


def test_everything_is_text_for_muon_too():
    model = Net()
    groups = [
        dict(params=[p for name, p in trainable(model) if name in HIDDEN], muon="true"),
        dict(params=[p for name, p in trainable(model) if name not in HIDDEN], muon="false"),
    ]
    opt = by_name("sgd_sai.MuonSaI", groups, **texts("lr=0.02,sai_lr=0.01,nesterov=false,momentum=0.9"))
    train(model, opt)
    settings = dict(lr=0.02, sai_lr=0.01, nesterov=False, momentum=0.9, weight_decay=0.1)

    def same(model):
        named = trainable(model)
        hidden = [p for name, p in named if name in HIDDEN]
        rest = [p for name, p in named if name not in HIDDEN]
        return MuonSaI([dict(params=hidden, muon=True), dict(params=rest, muon=False)], **settings)

    assert_same(model, plain(same))


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("option", ["lr=fast", "weight_decay=1.2.3", "maximize=perhaps", "eps=[1]"])
def test_what_cannot_be_read_is_named(cls, option):
    "A `ValueError` with the name of the argument and what was given."
    model = Net()
    params = model if cls is MuonSaI else model.parameters()
    key, value = option.split("=")
    with pytest.raises(ValueError, match=f"{key}.*{value[:3]}".replace("[", r"\[")):
        by_name(f"sgd_sai.{cls.__name__}", params, **{key: value})
