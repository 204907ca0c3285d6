"The equation whose terms show their code and what they do, in a browser: it follows the pointer, a finger and keys."

import re
import sys

import pytest

from sgd_sai.explore.term_pictures import TERMS, size_rows, step_of_digits

pytestmark = [pytest.mark.site, pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")]

ADDRESS = "explore/equation_code_picture.html"
ACCENT = "#C2410C"
CODE = {
    "g": ["g = theta.grad"],
    "G": ['if "G" not in state:', 'state["G"] = g.norm() / g.std()'],
    "m": ['m = state.get("m", g)', 'm = state["m"] = mu * m + (1 - mu) * g'],
    "decay": ["theta *= 1 - lr * wd"],
    "step": ['theta -= lr * state["G"] * m'],
}
PIECES = {"g": "∇ loss(θ)", "G": "‖g‖ / σ(g)", "m": "μ m + (1 − μ)", "decay": "(1 − lr wd) θ", "step": "− lr"}


@pytest.fixture
def page(open_page):
    page = open_page(ADDRESS)
    page.wait_for_selector(".live-figure svg")
    return page


def texts(page, color=None):
    "The texts of the chart, all or those of a colour."
    chosen = f'[fill="{color}"]' if color else ""
    return page.locator(f".live-figure svg text{chosen}").all_text_contents()


def middle(page, text):
    "The place of a text in the chart, which is scrolled into view."
    found = page.locator(".live-figure svg text").filter(has_text=re.compile(f"^{re.escape(text)}$"))
    found.first.scroll_into_view_if_needed()
    box = found.first.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def point_at(page, text):
    "Move the pointer to a text of the chart, and wait until the chart has followed."
    page.mouse.move(*middle(page, text))
    page.wait_for_timeout(100)


def shows(page, term):
    "True if the chart shows a term: its code in colour, no other, and its button pressed."
    lit = [text for text in texts(page, ACCENT) if text in sum(CODE.values(), [])]
    return lit == CODE[term] and page.locator(".vega-bindings input:checked").get_attribute("value") == term


@pytest.fixture(scope="module")
def sizes():
    "For each term: sizes of the first weight before and after it, by the library."
    return {
        row["term"]: (row["before"], row["after"])
        for row in size_rows(step_of_digits())
        if row["tensor"].startswith("0.weight")
    }


def printed_sizes(page):
    found = [re.search(r", of size (\S+)$", text) for text in texts(page)]
    return [float(match[1]) for match in found if match]


def test_pointing_at_the_equation_changes_code_and_picture(page, sizes):
    assert shows(page, "m")
    pictures = set()
    for term in TERMS:
        point_at(page, PIECES[term])
        assert shows(page, term)
        assert printed_sizes(page) == pytest.approx(sizes[term], rel=0.03)
        squares = page.locator(".live-figure svg .mark-symbol path").evaluate_all(
            "all => all.map(one => one.getAttribute('d') + one.getAttribute('fill')).join()"
        )
        pictures.add(squares)
    assert len(pictures) == len(TERMS)
    assert page.foreign == [] and page.complaints == []


@pytest.mark.parametrize("term", TERMS)
def test_pointing_at_the_code(page, term):
    point_at(page, CODE["g" if term == "m" else "m"][0])  # the chart begins with m
    point_at(page, CODE[term][-1])
    assert shows(page, term)


def test_what_has_no_term_changes_nothing(page):
    point_at(page, CODE["decay"][0])
    point_at(page, "@torch.no_grad()")
    page.mouse.move(5, 5)
    page.wait_for_timeout(100)
    assert shows(page, "decay")


def test_buttons(page):
    "For a reader with a keyboard."
    page.focus(".vega-bindings input:checked")
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(100)
    assert shows(page, "decay")


def test_touch(page):
    "A finger that taps makes a click."
    x, y = middle(page, PIECES["step"])
    page.evaluate(
        """([x, y]) => document.elementFromPoint(x, y).dispatchEvent(
            new PointerEvent("click", {bubbles: true, pointerType: "touch", clientX: x, clientY: y}))""",
        [x, y],
    )
    page.wait_for_timeout(100)
    assert shows(page, "step")


@pytest.mark.parametrize("width", [1280, 390])
def test_picture_without_scripts(open_page, width):
    page = open_page(ADDRESS, width=width, scripts=False)
    picture = page.locator(".live-figure img")
    assert picture.is_visible() and "momentum" in picture.get_attribute("alt")
    assert picture.bounding_box()["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(open_page, scheme):
    page = open_page(ADDRESS, width=390, scheme=scheme)
    page.wait_for_selector(".live-figure svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 391
    assert page.locator(".live-figure svg").bounding_box()["width"] <= 390


def test_annotations_are_numbers(page):
    "As on the site that Quarto builds: a number behind each line, and a numbered list that explains them."
    code = page.locator("pre", has_text="def step(theta")
    assert code.locator(".annotation-number").all_text_contents() == list("1223345")
    listed = page.locator("ol").filter(has_text="the gradient that").locator("li")
    assert [item.split(",")[0].split(" ")[0].strip(":") for item in listed.all_inner_texts()] == list(TERMS)
