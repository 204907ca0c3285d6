"""What does my model get? and The runs, in a browser: they answer, and their numbers are those of the library."""

import math
import re
import sys

import pytest
import torch
from pages import ROOT

from sgd_sai import MuonSaI, SGDSaI
from sgd_sai.experiments.optimizers import build_optimizer
from sgd_sai.experiments.runs import load_runs
from sgd_sai.experiments.state_rules import make_steps, state_bytes
from sgd_sai.experiments.tasks.registry import get_task
from sgd_sai.explore.what_does_my_model_get import suggested_settings

MODELS, RUNS = "explore/what_does_my_model_get.html", "explore/the_runs.html"
RESULTS = ROOT / "results"
POINTS = "figure svg g.mark-symbol.role-mark"

pytestmark = [pytest.mark.site, pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")]


def choose(page, **choices):
    "Choose words from menus, by the names of their parameters."
    for name, words in choices.items():
        page.select_option(f"figure select[name={name}]", label=words)
    page.wait_for_timeout(300)


def texts(page):
    "The words in the panels of the figure."
    return [text.text_content() for text in page.query_selector_all("figure svg g.mark-text.role-mark text")]


def shown(page, pattern):
    "What the group of a pattern is in the words of the figure."
    found = [match[1] for text in texts(page) if (match := re.search(pattern, text))]
    assert len(found) == 1, (pattern, texts(page))
    return found[0]


def points(page, panel=0):
    "The points of a panel."
    return page.query_selector_all(POINTS)[panel].query_selector_all("path")


def click(page, point):
    "Click into the middle of a point."
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_timeout(300)


def is_on_top(point):
    "True if a click into the middle of a point hits it, and not another one above it."
    point.scroll_into_view_if_needed()
    return point.evaluate(
        """point => {
            const box = point.getBoundingClientRect();
            return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === point;
        }"""
    )


def described(point):
    "The numbers and words that Vega says a point has."
    return dict(part.split(": ", 1) for part in point.get_attribute("aria-label").split("; ") if ": " in part)


def in_bytes(text):
    "'4.5 kB' as a number."
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


@pytest.mark.parametrize("address", [MODELS, RUNS])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_with_charts(open_chart, address, width, scheme):
    page = open_chart(address, width, scheme)
    shots = ROOT / "build" / "screenshots"
    shots.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=shots / f"{address[8:-5]}-{scheme}-{width}.png", full_page=True)
    assert page.foreign == [] and page.complaints == []
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 1, f"the page is {overflow} pixels wider than the window"
    chart, column = (page.query_selector(place).bounding_box() for place in ("figure svg", "figure.live-figure"))
    assert 0.9 * column["width"] < chart["width"] <= column["width"] + 1


@pytest.mark.parametrize("address", [MODELS, RUNS])
def test_pages_are_small_and_show_a_picture_without_scripts(open_page, site, address):
    page = open_page(address, scripts=False)
    picture = page.query_selector("figure.live-figure img")
    assert picture.is_visible() and picture.bounding_box()["height"] > 300 and picture.get_attribute("alt")
    assert page.query_selector("figure svg") is None and (site / address).stat().st_size < 600_000


@pytest.fixture(scope="module")
def digits_vit():
    "The model of the digits, whose state is measured."
    torch.manual_seed(0)
    model = get_task("digits-vit").build({})
    for p in model.parameters():
        torch.nn.init.uniform_(p, 1, 2)  # a bias of zeros would have no gradient below, and so no state yet
    return model


def measured_state(name, model):
    "Bytes that an optimizer really keeps after two steps."
    optimizer = build_optimizer(name, model, {"lr": 1e-6})
    make_steps([optimizer], [*model.parameters()])
    return state_bytes(optimizer)


def test_state_and_rates_are_those_of_the_optimizers(open_chart, digits_vit):
    page = open_chart(MODELS)
    choose(page, number="digits-vit", source="SGDM")
    lr, decay = (float(shown(page, rf"SGDSaI.*{name}=([\d.e-]+)[,)]")) for name in ("lr", "weight_decay"))
    sizes = [math.sqrt(p.numel()) for name, p in digits_vit.named_parameters() if "layers" in name]
    expected = suggested_settings("sgdm", 0.1, 1e-4, max(sizes))
    assert (lr, decay) == pytest.approx(expected, rel=0.05)

    choose(page, source="AdamW")
    for label, name in (("AdamW", "adamw"), ("SGD-SaI", "sgd_sai")):
        assert in_bytes(shown(page, f"state of {label}: (.*)")) == pytest.approx(measured_state(name, digits_vit), 1e-3)

    optimizer = SGDSaI(digits_vit.named_parameters(), lr=1e-2, scale="sqrt_numel")
    make_steps([optimizer], [*digits_vit.parameters()], steps=1)
    rates = {name: 1e-2 * optimizer.state[p]["gsnr"] for name, p in digits_vit.named_parameters()}
    found = {words["name"]: float(words["rate"]) for words in map(described, points(page))}
    assert found == pytest.approx(rates, rel=1e-3)


def test_muon_has_the_rates_of_its_role_table(open_chart, digits_vit):
    page = open_chart(MODELS)
    choose(page, number="digits-vit", target="MuonSaI")
    rows = {row.name: row for row in MuonSaI(digits_vit).role_table()}
    found = {words["name"]: words for words in map(described, points(page))}
    assert found.keys() == rows.keys()
    for name, words in found.items():
        assert float(words["rate"]) == pytest.approx(rows[name].rate) and words["role"] == rows[name].role
    click(page, points(page)[-1])
    assert shown(page, r"(classifier\.bias)10, scale")


@pytest.fixture(scope="module")
def runs():
    "Every run that has a result."
    return [run for run in load_runs(RESULTS) if run["final"]]


def test_runs_are_filtered_by_menus_and_legend(open_chart, runs):
    page = open_chart(RUNS)
    of_task = [run["optimizer"] for run in runs if run["task"] == "kjv-gpt2"]
    choose(page, task="kjv-gpt2")
    assert shown(page, r"^(\d+ of \d+) runs") == f"{len(of_task)} of {len(of_task)}"
    choose(page, only="AdamW")
    assert shown(page, r"^(\d+) of \d+ runs on kjv-gpt2$") == str(of_task.count("adamw"))
    assert [len(points(page, panel)) for panel in range(3)] == [of_task.count("adamw")] * 3

    choose(page, only="all")
    for label in ("AdamW", "SGD-SaI"):
        page.locator("figure svg .role-legend-label text").get_by_text(label, exact=True).click()
        page.wait_for_timeout(300)
    assert shown(page, r"^(\d+) of") == str(of_task.count("adamw") + of_task.count("sgd_sai"))


def test_a_click_shows_the_command_that_repeats_the_run(open_chart, runs):
    page = open_chart(RUNS)
    choose(page, task="kjv-gpt2", only="SGD-SaI")
    point = next(point for point in points(page) if is_on_top(point))
    words = described(point)
    click(page, point)
    place = shown(page, r"^sgd-sai repeat (.*)$")
    file, key = place.split("#")
    run = next(run for run in runs if run["key"] == key)
    assert file == "results/kjv-gpt2.jsonl" and run["task"] == "kjv-gpt2" and run["optimizer"] == "sgd_sai"
    assert run["hyperparameters"]["lr"] == float(words["learning rate"]) and run["seed"] == int(words["seed"])
    assert run["final"]["val_loss"] == pytest.approx(float(words["result"]), rel=1e-3)
    page.locator("figure svg text", has_text="sgd-sai repeat").click(click_count=3)
    assert place in page.evaluate("getSelection().toString()")


def test_a_rectangle_marks_the_same_runs_in_all_panels(open_chart, runs):
    page = open_chart(RUNS)
    choose(page, task="kjv-gpt2", only="AdamW")
    assert page.query_selector_all("figure svg g.mark-line.role-mark path") == []
    best = min((run for run in runs if run["task"] == "kjv-gpt2" and run["optimizer"] == "adamw"), key=final_loss)
    at = next(point for point in points(page) if float(described(point)["result"]) <= final_loss(best) + 1e-3)
    at.scroll_into_view_if_needed()
    box = at.bounding_box()
    page.mouse.move(box["x"] - 6, box["y"] - 6)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] + 6, box["y"] + box["height"] + 6, steps=5)
    page.mouse.up()
    page.wait_for_timeout(300)
    strong = [{p.get_attribute("aria-label") for p in points(page, n) if is_strong(p)} for n in range(3)]
    results = [sorted(re.search("result: ([^;]*)", label)[1] for label in panel) for panel in strong]
    assert results[0] == results[1] == results[2] and 0 < len(results[0]) < len(points(page))
    assert page.query_selector_all("figure svg g.mark-line.role-mark path")


def final_loss(run):
    "The validation loss at the end."
    return run["final"]["val_loss"]


def is_strong(point):
    "True for a point that is not faded."
    return float(point.get_attribute("opacity") or 1) > 0.5
