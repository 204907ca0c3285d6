"""Code as a reader meets it in a browser: the class near the top of its page, every block of code with a background of
its own, with colours, and with a button that copies it; internals folded away."""

import ast
import html
import inspect
import re
import sys

import pytest
from pages import ROOT

import sgd_sai

CLASSES = {"sgd_sai": "SGDSaI", "muon_sai": "MuonSaI", "adan": "Adan", "adahessian": "AdaHessian"}
PAGES = ["optimizers/sgd_sai.html", "tutorials/replace_adamw.html", "reports/adan.html"]
ALL_BLOCKS = """blocks => blocks.map(pre => {
    const color = element => getComputedStyle(element).color;
    let behind = pre;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const words = [...pre.querySelectorAll("span")].filter(span => !span.children.length && span.textContent.trim());
    return {
        text: pre.querySelector("code").textContent,
        language: ["python", "diff"].find(name => pre.classList.contains(name)) || "other",
        background: getComputedStyle(behind).backgroundColor,
        page: getComputedStyle(document.body).backgroundColor,
        colors: new Set([color(pre.querySelector("code")), ...words.map(color)]).size,
        copies: !!pre.closest(".code-copy-outer-scaffold, div.sourceCode").querySelector(".code-copy-button")
            || !!pre.parentElement.parentElement.querySelector(".code-copy-button"),
    };
})"""

pytestmark = [pytest.mark.site, pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")]


def unfold(page):
    "Open what is folded, since what cannot be seen has no place."
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("address", PAGES)
def test_blocks_of_code_have_colours_and_a_button(open_page, address, scheme):
    page = open_page(address, scheme=scheme)
    unfold(page)
    printed = ".cell-output > pre, details.answer pre.text"  # by a cell, or by the answer of an exercise
    blocks = page.eval_on_selector_all(f"main pre:not({printed})", ALL_BLOCKS)
    assert len(blocks) > 3
    assert [block["text"][:60] for block in blocks if not block["copies"]] == []
    assert [block["text"][:60] for block in blocks if block["background"] == block["page"]] == []
    python = [block for block in blocks if block["language"] != "other" and len(block["text"].split()) > 3]
    assert python and [block["text"][:60] for block in python if block["colors"] < 2] == []


@pytest.mark.parametrize("address", PAGES)
def test_button_puts_the_code_to_the_clipboard(open_page, address):
    page = open_page(address)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for i in range(3):
        button = page.locator("main .code-copy-button").nth(i)
        code = page.locator("main pre.sourceCode > code").nth(i).text_content()
        assert float(button.evaluate("button => getComputedStyle(button).opacity")) > 0.5
        button.click()
        page.wait_for_timeout(100)
        assert page.evaluate("navigator.clipboard.readText()") == code


@pytest.mark.parametrize("name", CLASSES)
def test_class_begins_near_the_top(open_page, name):
    page = open_page(f"optimizers/{name}.html")
    heading = page.locator(f"main #{CLASSES[name].lower()}")
    top = heading.evaluate("element => element.getBoundingClientRect().top + scrollY")
    assert top < 1800 and top < 0.2 * page.evaluate("document.documentElement.scrollHeight")


@pytest.mark.parametrize("name", CLASSES)
def test_internals_are_last_and_folded(open_page, name):
    page = open_page(f"optimizers/{name}.html")
    headings = page.locator("main h2").all_inner_texts()
    assert headings[-2] == "Internals"
    folded = page.locator("main details:not([open]) > summary").all_inner_texts()
    assert any(CLASSES[name] in summary for summary in folded), "the source of the class, whose entry is above"
    where = page.evaluate(
        """() => {
            const top = element => element.getBoundingClientRect().top;
            const internals = top(document.querySelector("main #internals"));
            return [...document.querySelectorAll("main details:not([open])")].filter(
                each => each.textContent.includes("Source: ") && top(each) < internals).length;
        }"""
    )
    assert where == 0


@pytest.mark.parametrize("name", CLASSES)
def test_class_has_a_table_of_its_parameters(open_page, name):
    page = open_page(f"optimizers/{name}.html")
    table = page.locator("main table.parameters").first
    assert table.locator("th").all_inner_texts() == ["name", "type", "default", "meaning"]
    names = table.locator("tbody td:first-child").all_inner_texts()
    assert names == [*inspect.signature(getattr(sgd_sai, CLASSES[name])).parameters]
    assert all(table.locator("tbody td:nth-child(4)").all_inner_texts())


def test_tables_of_parameters_fit_a_phone(open_page):
    page = open_page("optimizers/muon_sai.html", width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 391
    widths = page.eval_on_selector_all(
        "main table.parameters td", "cells => cells.map(c => c.getBoundingClientRect().right)"
    )
    assert widths and max(widths) <= 390


def signatures(path):
    "The text of every signature of a page: the first block after the heading of an entry."
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r'class="entry-source".*?<code class="sourceCode python">(.*?)</code>', text, re.DOTALL):
        yield html.unescape(re.sub("<[^>]+>", "", block))


def test_entries_lead_to_their_line(site):
    text = (site / "optimizers" / "sgd_sai.html").read_text(encoding="utf-8")
    links = re.findall(r'<a[^>]*class="[^"]*entry-source[^>]*>', text)
    lines = (ROOT / "sgd_sai" / "sgd_sai.py").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines, start=1) if line.startswith("class SGDSaI("))
    assert len(links) == 3 and f'/sgd_sai/sgd_sai.py#L{first}"' in links[0]


def test_signatures_of_all_pages_are_python(site):
    found = [(path.name, text) for path in sorted(site.rglob("*.html")) for text in signatures(path)]
    pages = (site.parent / "_proc").rglob("*.ipynb")
    entries = sum(page.read_text(encoding="utf-8").count("{.entry-source}") for page in pages)
    assert len(found) == entries > 600
    for _, text in found:
        ast.parse(f"{re.sub('^class', 'def', text)}: ...")
    forbidden = re.compile(r"\b(Union|Optional|Annotated)\b|<class|<function|typing\.")
    assert [(name, text) for name, text in found if forbidden.search(text)] == []
