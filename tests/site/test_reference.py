"""The reference is complete: every exported name says what it is, and every name of the package itself has documented
parameters and an example that a reader sees."""

import ast
import inspect
import re
from collections import Counter

import pytest
from pages import EXPORTED, code_cells

import sgd_sai

HIDDEN = re.compile(r"#\s*\|\s*(hide\b|include:\s*false|echo:\s*false)")
WITHOUT_DOCSTRING = {"check", "cells", "forward"}  # methods that say the same in every class
CELLS = list(code_cells())


def definitions():
    "The page, and the node, of every public class and function that is exported."
    for page, source in CELLS:
        if EXPORTED.match(source):
            for node in ast.parse(source).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                    yield page, node


def public_methods():
    "The page, the class and the node of every public method that is exported."
    for page, node in definitions():
        methods = node.body if isinstance(node, ast.ClassDef) else ()
        for method in methods:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                yield page, node, method


def test_every_exported_name_has_a_docstring():
    assert len(list(definitions())) > 200
    assert [f"{page}: {node.name}" for page, node in definitions() if not ast.get_docstring(node)] == []


def test_every_public_method_has_a_docstring():
    silent = [
        f"{page}: {node.name}.{method.name}"
        for page, node, method in public_methods()
        if not ast.get_docstring(method) and method.name not in WITHOUT_DOCSTRING
    ]
    assert silent == []


def test_no_two_exported_names_are_equal():
    "A name in backticks becomes a link to its page; with two of them it would lead to either."
    names = Counter(node.name for _, node in definitions())
    assert [name for name, count in names.items() if count > 1] == []


def definition_page(name):
    "The page that defines a public name; None for a table, which is assigned."
    pages = [page for page, node in definitions() if node.name == name]
    return pages[0] if pages else None


@pytest.mark.parametrize("name", sgd_sai.__all__)
def test_public_name_has_an_example(name):
    assigned = re.compile(rf"^{name}\b[^\n]*=", re.MULTILINE)
    page = definition_page(name) or next(p for p, s in CELLS if EXPORTED.match(s) and assigned.search(s))
    shown = [s for p, s in CELLS if p == page and not EXPORTED.match(s) and not HIDDEN.match(s)]
    assert any(re.search(rf"\b{name}\b", source) for source in shown), f"no visible cell of {page} uses {name}"


@pytest.mark.parametrize("name", [name for name in sgd_sai.__all__ if callable(getattr(sgd_sai, name))])
def test_public_name_has_documented_parameters(name):
    from fastcore.docments import docments

    thing = getattr(sgd_sai, name)
    assert inspect.getdoc(thing)
    told = docments(thing.__init__ if inspect.isclass(thing) else thing)
    parameters = [p for p in inspect.signature(thing).parameters if p not in ("self", "kwargs")]
    assert [p for p in parameters if not told.get(p)] == [], f"{name} does not say what these are"
