"The exercise of the site, in a browser: its cell is edited there, runs there, and is judged as in the notebook."

import json
import sys

import pytest
import torch

from sgd_sai import SGDSaI

pytestmark = [pytest.mark.site, pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")]

ADDRESS = "explore/write_it_yourself.html"


@pytest.fixture
def page(open_page):
    return open_page(ADDRESS)


def told(page):
    "What the page says when the cell has run."
    page.wait_for_function("!document.querySelector('.python-buttons button').disabled", timeout=30_000)
    return page.inner_text(".python-output")


def run(page, change=lambda code: code):
    "Change the code in the editor and run it: what it prints."
    page.fill(".python-exercise textarea", change(page.input_value(".python-exercise textarea")))
    page.click("button:text-is('Run')")
    return told(page)


def test_skeleton_is_not_written_yet(page):
    assert run(page) == "not written yet\n"
    assert page.foreign == [] and page.complaints == []


def test_answer_is_right_and_reset_takes_it_away(page):
    skeleton = page.input_value(".python-exercise textarea")
    page.click("text=Show the answer")
    assert "all four parts right" in run(page)
    page.click("text=Reset")
    assert page.input_value(".python-exercise textarea") == skeleton and "raise NotImplementedError" in skeleton
    assert page.foreign == [] and page.complaints == []


MISTAKES = {
    "momentum": ('momentum * state["m"] + (1 - momentum) * g', "g", "forgotten"),
    "scale": ("ddof=1", "", "divides by n - 1"),
    "decay": (" * (1 - lr * weight_decay)", "", "forgotten"),
    "step": ("theta - lr", "theta + lr", "against"),
}


@pytest.mark.parametrize("part", MISTAKES)
def test_a_mistake_is_named(page, part):
    right, wrong, hint = MISTAKES[part]
    page.click("text=Show the answer")
    lines = run(page, lambda code: code.replace(right, wrong)).splitlines()
    faults = [line for line in lines if "wrong" in line]
    assert len(faults) == 1 and faults[0].startswith(part) and hint in faults[0]
    assert page.complaints == []


def test_errors_say_where(page):
    skeleton = page.input_value(".python-exercise textarea")
    assert run(page, lambda code: code.replace("raise NotImplementedError", "return 1 / 0")) == (
        "ZeroDivisionError: division by zero (line 7)\n"
    )
    page.fill("textarea", skeleton)
    assert "SyntaxError" in run(page, lambda code: code.replace("momentum, weight_decay):", "momentum, weight_decay)"))
    page.fill("textarea", skeleton)
    assert "returns nothing" in run(page, lambda code: code.replace("raise NotImplementedError", "theta = 1"))
    assert page.complaints == []


def test_a_program_without_end_is_stopped(page):
    page.fill("textarea", "print('begun')\nwhile True:\n    pass")
    page.clock.install()
    page.click("button:text-is('Run')")
    page.wait_for_function("!document.querySelector('.python-output').textContent.includes('loaded')", timeout=30_000)
    page.clock.fast_forward(11_000)
    assert "stopped" in told(page)
    page.click("text=Reset")
    assert run(page) == "not written yet\n"


def test_keys(page):
    "The cell is reached, run and left without a pointer."
    page.focus(".python-exercise textarea")
    page.keyboard.press("Control+Enter")
    assert told(page) == "not written yet\n"
    page.fill("textarea", "if True:")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    page.keyboard.type("print(6 * 7)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Run"
    page.keyboard.press("Enter")
    assert told(page) == "42\n"


def test_python_is_loaded_when_it_is_run(page):
    loaded = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if "brython" in name or "modules.js" in name] == []
    with page.expect_request(lambda request: request.url.endswith("python/brython.js")):
        run(page)


def test_numbers_are_the_library_s(page):
    expected = json.loads(page.text_content(".python-exercise script"))["expected"]
    assert len(expected["gradients"]) > 3 and set(expected["runs"]) == {"scale", "momentum", "decay"}
    for run in expected["runs"].values():
        parameter = torch.nn.Parameter(torch.tensor(expected["theta"]))
        settings = {key: run[key] for key in ("momentum", "weight_decay")}
        optimizer = SGDSaI([parameter], lr=expected["lr"], **settings)
        for g, theta in zip(expected["gradients"], run["thetas"], strict=True):
            parameter.grad = torch.tensor(g)
            optimizer.step()
            torch.testing.assert_close(parameter.detach(), torch.tensor(theta))


@pytest.mark.parametrize("width", [1280, 390])
def test_without_scripts_the_cell_is_code(open_page, width):
    page = open_page(ADDRESS, width=width, scripts=False)
    cell = page.locator(".python-exercise + .cell")
    assert "raise NotImplementedError" in cell.inner_text() and cell.locator("pre span.kw").count()
    assert page.locator("textarea").count() == 0
    answer = page.locator("details", has_text="The answer")
    assert answer.get_attribute("open") is None and "ddof=1" in answer.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(open_page, scheme):
    page = open_page(ADDRESS, width=390, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 391
    assert page.locator(".python-exercise textarea").bounding_box()["width"] <= 390
