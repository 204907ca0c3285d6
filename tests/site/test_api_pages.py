"""Pages of the reference as people read them: use first, signatures as Python writes them, tables of parameters, and
internals at the end. The package that their examples import is what the notebooks export."""

import ast
import html
import importlib
import inspect
import json
import re
from types import SimpleNamespace
from typing import Annotated, Optional, Union

import pytest
from pages import NBS, ROOT, cells, notebooks, page_name

import sgd_sai
from sgd_sai._modidx import d
from sgd_sai.internals import reference_entries as entries

CLASSES = {"sgd_sai": "SGDSaI", "muon_sai": "MuonSaI", "adan": "Adan", "adahessian": "AdaHessian"}
MAIN_NAMES = CLASSES | {
    "gsnr": "gsnr",
    "gsnr_of_models": "gsnr_table",
    "muon_groups": "muon_groups",
    "step_in_backward": "StepInBackward",
}


@pytest.fixture(scope="module")
def signatures():
    "Every public class and function that the package exports, with its signature."
    found = {}
    for module, names in d["syms"].items():
        for name in (full.removeprefix(f"{module}.") for full in names):
            if "." not in name and not name.startswith("_"):
                thing = getattr(importlib.import_module(module), name)
                found[thing] = entries.signature_text(thing)
    assert len(found) > 600
    return found


# --- what the notebooks export --------------------------------------------------------------------------------------


def definitions(path):
    "What a module of the package defines, without its imports, whose form nbdev and ruff change."
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kept = [node for node in body if not isinstance(node, (ast.Import, ast.ImportFrom, ast.If))]
    for node in (inner for outer in kept for inner in ast.walk(outer) if isinstance(inner, ast.ImportFrom)):
        node.module, node.level = None, 0  # of the package: relative in what is exported
    return [ast.dump(node) for node in kept if "__all__" not in ast.dump(node)]


def test_package_is_what_the_notebooks_export(tmp_path):
    "Examples that come before the code import it: without this they could test code of yesterday."
    from nbdev.export import nb_export

    different = []
    for notebook in (NBS / "optimizers").glob("*.ipynb"):
        nb_export(notebook, lib_path=tmp_path)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")]
    for path in written:
        if path.name != "_modidx.py" and definitions(tmp_path / path) != definitions(ROOT / "sgd_sai" / path):
            different.append(path.as_posix())
    assert len(written) > 30 and different == [], "`make export` writes the package"


# --- entries --------------------------------------------------------------------------------------------------------


def test_signatures_are_python(signatures):
    for thing, signature in signatures.items():
        assert signature.startswith(("class ", "def ")) and (signature.startswith("class ")) == inspect.isclass(thing)
        ast.parse(f"{re.sub('^class', 'def', signature)}: ...")


def test_signatures_have_nothing_but_the_type(signatures):
    forbidden = re.compile(r"\b(Union|Optional|Annotated)\b|<class|<function|typing\.|\bobject at\b")
    assert [text for text in signatures.values() if forbidden.search(text)] == []


def test_signatures_have_the_parameters_in_their_order():
    for thing in (sgd_sai.SGDSaI, sgd_sai.MuonSaI, sgd_sai.Adan, sgd_sai.AdaHessian, sgd_sai.gsnr):
        node = ast.parse(f"{re.sub('^class', 'def', entries.signature_text(thing))}: ...").body[0]
        written = [argument.arg for argument in node.args.args], [argument.arg for argument in node.args.kwonlyargs]
        real = inspect.signature(thing).parameters.values()
        assert written[0] == [p.name for p in real if p.kind == p.POSITIONAL_OR_KEYWORD]
        assert written[1] == [p.name for p in real if p.kind == p.KEYWORD_ONLY]


def test_signature_of_a_class_and_its_defaults():
    signature = entries.signature_text(sgd_sai.SGDSaI)
    assert signature.startswith("class SGDSaI(\n    params,\n    lr: float | Tensor = 1e-2,\n")
    assert '    eps: float = 1e-8,\n    *,\n    scale: str | Callable = "gsnr",\n' in signature


Count = Annotated[Optional[int], SimpleNamespace(help="How many.")]


def odd(a: "Optional[str]", /, b: Union[int, None, list[Optional[str]]], *rest: int, c: Count = None, **more) -> "str":
    "All kinds of parameters."


def test_types_in_every_form():
    lines = [line.strip().removesuffix(",") for line in entries.signature_text(odd).split("\n")]
    assert lines[1:-1] == [
        "a: str | None",
        "/",
        "b: int | None | list[str | None]",
        "*rest: int",
        "c: int | None = None",
        "**more",
    ]
    assert lines[-1] == ") -> str"
    assert [p.meaning for p in entries.parameters_of(odd)[0] if p.name == "c"] == ["How many."]


def test_long_signatures_are_broken_as_formatters_do(signatures):
    for signature in signatures.values():
        lines = signature.split("\n")
        assert len(lines[0]) <= entries.WIDTH or lines[0].endswith("(")
        assert len(lines) == 1 or all(line.startswith("    ") for line in lines[1:-1]) and lines[-1].startswith(")")


def test_tables_cannot_be_read_as_markdown():
    "A star in a comment would make the rest of it italic."

    def f(
        a: int | None = 2,  # lr*weight_decay, *not* [a](b), `x | y`
    ):
        "A function."

    row = entries.parameter_table(f).splitlines()[3]
    told = re.findall(r"<td>(.*?)</td>", row)
    assert not set("*_|[]$`") & set(row)
    assert [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in told] == [
        "a",
        "int | None",
        "2",
        "lr*weight_decay, *not* [a](b), x | y",
    ]


# --- notebooks ------------------------------------------------------------------------------------------------------


def outline(name):
    "The headings of the first level, and `show_doc(...)`, in the order in which a notebook has them."
    found = []
    for kind, source in ((kind, source) for kind, source in all_cells(NBS / "optimizers" / f"{name}.ipynb")):
        if kind == "markdown":
            found += re.findall(r"^## (.+)$", source, re.MULTILINE)
        found += re.findall(r"^(show_doc\(\w+, title_level=2\))$", source, re.MULTILINE)
    return found


def all_cells(path):
    "Kind and source of every cell of a notebook."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        yield cell["cell_type"], "".join(cell["source"])


@pytest.mark.parametrize("name", MAIN_NAMES)
def test_page_begins_with_its_use(name):
    wanted = ["Use", f"show_doc({MAIN_NAMES[name]}, title_level=2)", "What it raises", "What to know", "How it works"]
    assert outline(name)[:5] == wanted


@pytest.mark.parametrize("name", CLASSES)
def test_internals_come_after_everything_but_the_check_of_devices(name):
    assert outline(name)[-2] == "Internals"


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("name", MAIN_NAMES)
def test_example_at_the_top_can_be_copied(name):
    "It imports all that it uses, runs alone, and makes what the page is about."
    sources = []
    for kind, source in all_cells(NBS / "optimizers" / f"{name}.ipynb"):
        if source.startswith("show_doc"):
            break
        sources += [source] if kind == "code" and not source.startswith("#| hide") else []
    example = "\n".join(sources)
    assert re.search(rf"^from sgd_sai\S* import .*\b{MAIN_NAMES[name]}\b", example, re.MULTILINE)
    assert name not in CLASSES or "optimizer.step()" in example
    exec(compile(example, name, "exec"), {"__name__": "example"})


def fences():
    "Page, and first line, of every block of code in the text of a page; an indented block has no language."
    for path in notebooks():
        for _, text in cells(path, "markdown"):
            yield from (
                (page_name(path), line) for line in re.findall(r"^\s*(```.*)\n(?:[^`]|`(?!``))*```", text, re.M)
            )
            outside = re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.DOTALL | re.MULTILINE)
            for block in re.findall(r"(?:\A|\n[ \t]*\n)((?:    .+(?:\n|\Z))+)", outside):
                if not re.match(r"\s*([-*|]|\d+\.|\$)", block):
                    yield page_name(path), f"indented: {block.strip()[:40]}"


def test_every_block_of_code_has_a_language():
    "Without one it has neither colours nor, with Quarto, a button that copies it."
    assert len([*fences()]) > 50
    assert [
        (page, line)
        for page, line in fences()
        if not re.match(r"```\{?\.?(python|sh|yaml|toml|bibtex|diff|text)", line)
    ] == []
