"Every formula of the site can be drawn: Quarto hands them to pandoc, which writes MathML."

import ast
import re
import subprocess

import pypandoc
from pages import EXPORTED, cells, notebooks, page_name


def texts():
    "Name of the page, and text, of every Markdown cell and of every docstring that a page shows."
    for path in notebooks():
        yield from ((page_name(path), source) for _, source in cells(path, "markdown"))
        for _, source in cells(path, "code"):
            if EXPORTED.match(source):
                nodes = ast.walk(ast.parse(source))
                definitions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
                yield from ((page_name(path), ast.get_docstring(node) or "") for node in definitions)


def complaints(text):
    "What pandoc says about the formulas in a text that it cannot write as MathML."
    command = [pypandoc.get_pandoc_path(), "--from", "markdown", "--to", "html", "--mathml"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return re.findall(r"Could not convert TeX math (.*?)(?=, rendering as TeX)", done.stderr, re.DOTALL)


def test_pandoc_complains_about_what_it_cannot_draw():
    assert complaints(r"As $a^2$ and $\color{#C2410C}{G}$") != []


def test_every_formula_becomes_mathml():
    pages = {}
    for page, text in texts():
        pages[page] = pages.get(page, "") + "\n\n" + text
    assert sum(text.count("$") for text in pages.values()) > 600
    bad = {page: found for page, text in pages.items() if "$" in text and (found := complaints(text))}
    assert bad == {}
