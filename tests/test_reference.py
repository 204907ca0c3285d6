"The reference is complete: every exported name says what it is, and every name of the package itself has documented parameters and an example that a reader sees."
import ast
import inspect
import json
import re
from pathlib import Path

import pytest

import sgd_sai

NBS = Path(__file__).resolve().parents[1] / "nbs"
EXPORTED = re.compile(r"#\s*\|\s*exports?\b")
HIDDEN = re.compile(r"#\s*\|\s*(hide\b|include:\s*false|echo:\s*false)")


def code_cells():
    "Notebook, source of each code cell."
    for path in sorted(NBS.rglob("*.ipynb")):
        if not any(part.startswith(("_", ".")) for part in path.relative_to(NBS).parts):
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                if cell["cell_type"] == "code":
                    yield path.relative_to(NBS).as_posix(), "".join(cell["source"])


CELLS = list(code_cells())


def definitions():
    "Every public class and function that is exported, with the notebook it stands in."
    for name, source in CELLS:
        if EXPORTED.match(source):
            for node in ast.parse(source).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                    yield name, node


def test_every_exported_name_has_a_docstring():
    without = [f"{place}: {node.name}" for place, node in definitions() if not ast.get_docstring(node)]
    public = [f"{place}: {node.name}.{f.name}" for place, node in definitions() if isinstance(node, ast.ClassDef) for f in node.body
              if isinstance(f, ast.FunctionDef) and not f.name.startswith("_") and not ast.get_docstring(f) and f.name not in {"check", "cells", "forward"}]  # fmt: skip
    assert len(list(definitions())) > 200 and without + public == []


@pytest.mark.parametrize("name", sgd_sai.__all__)
def test_public_name_has_documented_parameters_and_an_example(name):
    thing = getattr(sgd_sai, name)
    assert inspect.getdoc(thing)
    places = [place for place, node in definitions() if node.name == name]
    places = [place for place in places if not place.startswith("experiments/")]  # the command line has commands of the same names
    assert len(places) == 1, f"{name} is defined in {places}"
    shown = [source for place, source in CELLS if place == places[0] and not EXPORTED.match(source) and not HIDDEN.match(source)]
    assert any(re.search(rf"\b{name}\(", source) for source in shown), f"no visible cell of {places[0]} calls {name}"
    if not callable(thing):
        return
    from fastcore.docments import docments

    told = docments(thing.__init__ if inspect.isclass(thing) else thing)
    silent = [p for p in inspect.signature(thing).parameters if p not in ("self", "kwargs") and not told.get(p)]
    assert silent == [], f"{name} does not say what these are: {silent}"
