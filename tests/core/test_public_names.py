"`import sgd_sai` brings in PyTorch when a name is first asked for, and everything else is as if it had been there."

import ast
import copy
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgd_sai


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def printed(code):
    done = python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_itself_does_not_need_torch():
    code = "import sys, sgd_sai; print('torch' in sys.modules, sgd_sai.__version__)"
    assert printed(code) == ["False", sgd_sai.__version__]


def test_names_are_listed_before_they_are_imported():
    code = "import sys, sgd_sai; print(*dir(sgd_sai)); assert 'torch' not in sys.modules"
    assert {*sgd_sai.__all__, "__version__"} <= set(printed(code))


@pytest.mark.parametrize("name", sgd_sai.__all__)
def test_every_name_can_be_asked_for_first(name):
    "As an attribute and by `from`, each in a process of its own."
    code = f"import sgd_sai; first = sgd_sai.{name}; from sgd_sai import {name}; print(first is {name})"
    assert printed(code) == ["True"]


@pytest.mark.parametrize("first", [
    "import sgd_sai.gsnr",
    "import sgd_sai.kernels",
    "from sgd_sai.gsnr import gsnr",
    "import sgd_sai.experiments.optimizers",
    "from sgd_sai import SGDSaI",
    "from sgd_sai import *",
    "import importlib, sgd_sai; sgd_sai.gsnr; importlib.reload(sgd_sai)",
])  # fmt: skip
def test_gsnr_is_the_function_whatever_is_imported_first(first):
    "A module of the package has the same name."
    code = f"{first}\nimport torch, sgd_sai\nfrom sgd_sai import gsnr as f\nprint(f is sgd_sai.gsnr, callable(f))"
    assert printed(code) == ["True", "True"]


def test_star_brings_all_names():
    code = "from sgd_sai import *\nimport sgd_sai as s\nprint(all(globals()[n] is getattr(s, n) for n in s.__all__))"
    assert printed(code) == ["True"]


def test_modules_are_attributes():
    assert printed("import sgd_sai; print(sgd_sai.kernels.__name__)") == ["sgd_sai.kernels"]


def test_a_name_that_there_is_not():
    done = python("import sgd_sai; sgd_sai.SGDSai")
    assert "AttributeError: module 'sgd_sai' has no attribute 'SGDSai'" in done.stderr
    done = python("from sgd_sai import SGDSai")
    assert "ImportError: cannot import name 'SGDSai' from 'sgd_sai'" in done.stderr
    assert not hasattr(sgd_sai, "__wrapped__")


def test_type_checkers_see_the_same_names():
    "They read the imports under TYPE_CHECKING, which nobody runs."
    tree = ast.parse(Path(sgd_sai.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        for alias in node.names:
            assert alias.asname == alias.name  # which makes it a name of this package for them
            seen[alias.name] = getattr(
                importlib.import_module(f"sgd_sai.{node.module.removeprefix('sgd_sai.')}"), alias.name
            )
    assert set(seen) == set(sgd_sai.__all__)
    assert all(getattr(sgd_sai, name) is what for name, what in seen.items())


def test_optimizers_are_pickled_by_their_modules(seeded):
    opt = sgd_sai.SGDSaI([torch.nn.Parameter(torch.randn(3, 2))], lr=0.1)
    for again in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)):
        assert type(again) is sgd_sai.SGDSaI and again.defaults["lr"] == 0.1
    assert sgd_sai.SGDSaI.__module__ == "sgd_sai.sgd_sai"
