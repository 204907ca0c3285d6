"""Tutorials as a reader meets them: code that fits the page, drawing folded away, and an exercise at the end, whose
answer is folded and was run."""

import re
import sys

import pytest
from pages import NBS, cells, notebooks, page_name
from saved_outputs import as_text, texts_agree

COLUMNS = 79
HIDDEN = re.compile(r"^#\|\s*(hide\b|echo:\s*false|include:\s*false)", re.MULTILINE)
FOLDED = re.compile(r"^#\|\s*code-fold:\s*true", re.MULTILINE)
SUMMARY = re.compile(r'^#\|\s*code-summary:\s*"[^"\s]', re.MULTILINE)
DRAWING = re.compile(r"\b(matplotlib|seaborn|plt|sns|figure_style|optimizer_style)\b")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ANSWER = re.compile(r'<details class="answer">\n<summary>Answer</summary>\n\n(.*?)\n</details>', re.DOTALL)
TUTORIALS = [path for path in notebooks() if NBS / "tutorials" in path.parents]
REPLACEMENTS = {
    "replace_adamw": ["SGDSaI"],
    "adan_and_adahessian": ["Adan", "AdaHessian"],
    "muon_without_adam": ["MuonSaI"],
}
DRAWS = "tutorials/scaling_at_initialization"

each_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=map(page_name, TUTORIALS))
needs_smalldocs = pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")


def prose(path):
    "All Markdown of a tutorial, as one text."
    return "\n\n".join(source for _, source in cells(path, "markdown"))


def shown(path):
    "The code cells that the site shows, with their sources; folded ones too."
    return [(cell, source) for cell, source in cells(path, "code") if not HIDDEN.search(source)]


def is_folded_in_jupyter(cell):
    return cell["metadata"].get("jupyter", {}).get("source_hidden") is True


def pictures(cell):
    return [output for output in cell["outputs"] if any(kind.startswith("image/") for kind in output.get("data", {}))]


@each_tutorial
def test_code_fits_the_page(path):
    code = [source for _, source in shown(path)] + [block[1] for block in BLOCK.findall(prose(path))]
    lines = [line for text in code for line in text.splitlines() if not line.startswith("#|")]
    lines += [line for line in prose(path).splitlines() if line.startswith("    ")]
    assert [line for line in lines if len(line) > COLUMNS] == []


@each_tutorial
def test_what_draws_is_folded(path):
    open_cells = [(cell, source) for cell, source in shown(path) if not FOLDED.search(source)]
    assert [source for cell, source in open_cells if pictures(cell) or DRAWING.search(source)] == []


@each_tutorial
def test_what_is_folded_says_so_and_is_folded_in_jupyter_too(path):
    folded = [(cell, source) for cell, source in shown(path) if FOLDED.search(source)]
    hidden = [(cell, source) for cell, source in cells(path, "code") if HIDDEN.search(source)]
    own = [(cell, source) for cell, source in hidden if "google.colab" not in source]  # that one is .ci/colab.py's
    assert [source for _, source in folded if not SUMMARY.search(source)] == []
    assert [source for cell, source in folded + own if not is_folded_in_jupyter(cell)] == []


@each_tutorial
def test_ends_with_an_exercise_and_a_folded_answer(path):
    heading, _, last = re.split(r"^## ", prose(path), flags=re.MULTILINE)[-1].partition("\n")
    question, *rest = last.split("<details")
    assert heading == "Exercise" and "?" in question
    assert len(ANSWER.findall(last)) == 1 == len(rest)


@each_tutorial
def test_the_answer_was_run(path):
    "Its code stands in a hidden cell, which goes on with assertions, and its output is what that cell printed."
    answer = ANSWER.search(prose(path))[1]
    blocks = dict(BLOCK.findall(answer))
    ((cell, source),) = [
        (cell, source)
        for cell, source in cells(path, "code")
        if HIDDEN.search(source) and cell["metadata"].get("jupyter", {}).get("outputs_hidden")
    ]
    assert blocks.keys() == {"python", "text"}
    _, found, checks = source.partition(blocks["python"].strip())
    assert found and "assert " in checks
    printed = "".join(as_text(output.get("text", "")) for output in cell["outputs"])
    assert texts_agree(blocks["text"].strip(), printed.strip()), printed


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_the_replacement_stands_before_any_code_that_runs(name):
    path = NBS / "tutorials" / f"{name}.ipynb"
    top = prose(path).partition("\n## ")[0]
    diffs = [block for language, block in BLOCK.findall(top) if language == "diff"]
    assert len(diffs) == len(REPLACEMENTS[name])
    for diff, optimizer in zip(diffs, REPLACEMENTS[name], strict=True):
        assert re.search(r"^- optimizer = AdamW\(", diff, re.MULTILINE)
        assert re.search(rf"^\+ optimizer = {optimizer}\(", diff, re.MULTILINE)


@pytest.mark.site
@needs_smalldocs
@each_tutorial
def test_folds_are_closed(site, path):
    text = (site / f"{page_name(path)}.html").read_text(encoding="utf-8")
    folds = sum(bool(FOLDED.search(source)) for _, source in shown(path))
    assert text.count('<details class="code-fold">') == folds
    assert text.count('<details class="answer">') == 1 and "<details open" not in text


@pytest.mark.site
@needs_smalldocs
@pytest.mark.parametrize("scripts", [True, False], ids=["with scripts", "without"])
def test_folds_open_on_a_click(open_page, scripts):
    page = open_page(f"{DRAWS}.html", scripts=scripts)
    fold, answer = page.locator("details.code-fold").first, page.locator("details.answer")
    for details, inside in ((fold, "import matplotlib.pyplot"), (answer, "torch.randn(10_000)")):
        code = details.locator("code", has_text=inside)
        assert not code.is_visible()
        details.locator("summary").click()
        assert code.is_visible()
    assert [text for text in page.complaints if "ERR_FAILED" not in text] == []


@pytest.mark.site
@needs_smalldocs
def test_no_line_of_code_is_wrapped(open_page):
    page = open_page("tutorials/choosing_lr_and_wd.html", width=1280)
    wrapped = page.evaluate("""() => [...document.querySelectorAll("main pre.cell-code > code")].filter(code => {
        const text = document.createRange(), lines = code.textContent.trimEnd().split("\\n").length
        text.selectNodeContents(code)
        const tops = new Set([...text.getClientRects()].map(box => Math.round(box.bottom)))
        return code.checkVisibility() && tops.size > lines
    }).map(code => code.textContent)""")
    assert wrapped == []
