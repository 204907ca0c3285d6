"Live figures in a browser: they answer, what they show is what the library computes, and there is a picture of each."

import base64
import copy
import re
import sys
from types import SimpleNamespace

import altair as alt
import pytest
import torch
from pages import ROOT, cells, notebooks, page_name
from saved_outputs import CHART, differences

from sgd_sai import SGDSaI
from sgd_sai.explore.drive_the_step import MOMENTA, STEPS, WIDTHS, layer_loss, random_layers
from sgd_sai.explore.live_figure import LiveFigure
from sgd_sai.orthogonalize import orthogonalize

LIVE, DRIVE, SINGULAR = "explore/live_figure.html", "explore/drive_the_step.html", "explore/singular_values.html"

needs_site = [pytest.mark.site, pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")]
on_the_site = [pytest.param(address, marks=needs_site) for address in (LIVE, DRIVE, SINGULAR)]


def press(page, slider, steps):
    "Move a slider by steps, to the right or (negative) to the left, as with the arrow keys."
    page.focus(f"figure input[name={slider}]")
    for _ in range(abs(steps)):
        page.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")
    page.wait_for_timeout(100)


def circles(page, title):
    "What Vega says of each circle whose first number has this title: a dictionary of texts."
    marks = "figure svg .mark-symbol.role-mark path"
    labels = page.eval_on_selector_all(marks, "marks => marks.map(mark => mark.getAttribute('aria-label'))")
    told = [dict(part.split(": ", 1) for part in label.split("; ")) for label in labels if label.startswith(title)]
    assert told, f"no circle says {title}"
    return told


# --- what all of them have in common --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("address", on_the_site)
def test_chart_takes_the_place_of_its_picture(open_chart, address, width, scheme):
    shots = ROOT / "build" / "screenshots"
    shots.mkdir(parents=True, exist_ok=True)
    page = open_chart(address, width, scheme)
    page.screenshot(path=shots / f"{address[8:-5]}-{scheme}-{width}.png", full_page=True)
    assert page.foreign == [] and page.complaints == []
    assert page.query_selector("figure.live-figure img") is None
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 1, f"the page is {overflow} pixels wider than the window"
    chart, column = (page.query_selector(place).bounding_box() for place in ("figure svg", "figure.live-figure"))
    assert 0.98 * column["width"] < chart["width"] <= column["width"]
    ink = page.evaluate("getComputedStyle(document.querySelector('figure svg .role-axis-title text')).fill")
    is_light = sum(map(int, ink.removeprefix("rgb(").removesuffix(")").split(","))) > 380
    assert is_light == (scheme == "dark")


@pytest.mark.parametrize("address", on_the_site)
def test_picture_stands_where_no_script_runs(open_page, site, address):
    page = open_page(address, scripts=False)
    picture = page.query_selector("figure.live-figure img")
    assert picture.is_visible() and picture.get_attribute("alt")
    assert picture.evaluate("image => image.naturalWidth") > 800 and picture.bounding_box()["height"] > 150
    assert page.query_selector("figure svg") is None
    assert (site / address).stat().st_size < 600_000


@pytest.mark.site
@pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")
def test_chart_follows_the_window(open_chart):
    page = open_chart(DRIVE)
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_function("document.querySelector('figure svg').getBoundingClientRect().width < 390")
    assert len(page.query_selector_all("figure svg")) == 1


@pytest.mark.site
@pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")
def test_only_pages_with_charts_load_vega(site):
    loading = {page for page in site.rglob("*.html") if "live-figures/vega.js" in page.read_text(encoding="utf-8")}
    with_charts = {site / f"{page_name(path)}.html" for path in notebooks() if any(charts(path))}
    assert loading == with_charts and len(loading) >= 3


def charts(path):
    "Data of the outputs of a notebook that are charts."
    for cell, _ in cells(path, "code"):
        yield from (output["data"] for output in cell["outputs"] if CHART in output.get("data", {}))


def test_saved_charts_have_a_picture_and_say_what_they_show():
    saved = [(path, data) for path in notebooks() for data in charts(path)]
    assert len(saved) >= 3
    for path, data in saved:
        assert base64.b64decode("".join(data["image/png"])).startswith(b"\x89PNG") and data[CHART]["description"]
        assert "text/html" not in data and path.stat().st_size < 1_000_000


def test_saved_charts_are_compared_by_their_numbers():
    path = ROOT / "nbs" / "explore" / "live_figure.ipynb"
    saved = [{"output_type": "execute_result", "data": data, "metadata": {}} for data in charts(path)]
    now, cell = copy.deepcopy(saved), SimpleNamespace(source="figure", get=lambda key, default: default)
    row = now[0]["data"][CHART]["data"]["values"][5]
    now[0]["data"]["image/png"] = "another picture"
    row["loss"] *= 1.001
    assert differences(cell, saved, now) == []
    row["loss"] *= 1.1
    assert len(differences(cell, saved, now)) == 1
    now[0]["data"] = {"image/png": "a picture alone"}
    assert len(differences(cell, saved, now)) == 1


def test_colab_gets_a_page_with_its_scripts_inside(monkeypatch):
    figure = LiveFigure(alt.Chart(alt.Data(values=[{"x": 1}])).mark_point().encode(x="x:Q"), "a point")
    assert "text/html" not in figure._repr_mimebundle_()
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    page = figure._repr_mimebundle_()["text/html"]
    assert len(page) > 500_000 and not re.search(r"<(script|link)[^>]*(src|href)=", page)


# --- drive the step -------------------------------------------------------------------------------------------------


def train(make, lr, momentum, widths):
    "Losses of the layers after all steps, by the optimizer alone; None where they are beyond all numbers of the axis."
    torch.manual_seed(0)
    layers, targets = random_layers(widths), random_layers(widths)
    for layer in layers:
        layer.requires_grad_()
    optimizer = make(layers, lr, momentum)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(map(layer_loss, layers, targets)).backward()
        optimizer.step()
    return [layer_loss(layer, target).item() for layer, target in zip(layers, targets, strict=True)]


TRAINED = {
    "SGDM": lambda layers, lr, mu: torch.optim.SGD(layers, lr=lr, momentum=mu, dampening=mu),
    "SGD-SaI": lambda layers, lr, mu: SGDSaI(layers, lr=lr, momentum=mu, weight_decay=0),
    "Adam": lambda layers, lr, mu: torch.optim.Adam(layers, lr=lr, betas=(mu, 0.999)),
}


def as_number(text):
    return float(text.replace("−", "-"))


def by_optimizer(told):
    "Numbers of circles: optimizer -> the three layers' values."
    found = {}
    for circle in told:
        found.setdefault(circle["optimizer"], []).append(as_number(next(iter(circle.values()))))
    return found


@pytest.mark.site
@pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")
def test_sliders_choose_runs_of_the_library(open_chart):
    page = open_chart(DRIVE)
    before = circles(page, "loss of each layer")
    press(page, "rate_number", -1)
    press(page, "momentum_number", 1)
    told = circles(page, "loss of each layer")
    assert told != before
    assert "momentum 0.8" in page.text_content("figure svg") and "1/2 ×" in page.text_content("figure svg")
    shown = by_optimizer(told)
    rates = {circle["optimizer"]: as_number(circle["lr"]) for circle in told}
    for name, make in TRAINED.items():
        assert shown[name] == pytest.approx(train(make, rates[name], MOMENTA[2], WIDTHS[2]), rel=2e-3), name
    assert rates["SGDM"] == 16 * rates["SGD-SaI"]


@pytest.mark.site
@pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")
def test_equal_layers_make_equal_optimizers(open_chart):
    page = open_chart(DRIVE)
    apart = {name: max(moved) / min(moved) for name, moved in by_optimizer(circles(page, "relative")).items()}
    assert apart["SGDM"] > 5 > 2 > apart["SGD-SaI"]
    press(page, "layers_number", -2)
    moved = by_optimizer(circles(page, "relative"))
    assert moved["SGDM"] == pytest.approx(moved["lr √n"], rel=1e-3)
    assert moved["SGDM"] == pytest.approx(moved["SGD-SaI"], rel=1e-2)


@pytest.mark.site
@pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")
def test_legend_and_pointer(open_chart):
    page = open_chart(DRIVE)
    page.click("figure svg .role-legend-label text:text('Adam')")
    page.wait_for_timeout(200)
    lines = {line.get_attribute("aria-label"): line for line in page.query_selector_all("figure svg .mark-line path")}
    bright = [label for label, line in lines.items() if float(line.get_attribute("opacity") or 1) == 1]
    assert len(lines) == 5 and len(bright) == 1 and "optimizer: Adam" in bright[0]
    page.hover("figure svg .mark-symbol path[aria-label^='relative'][aria-label*='Muon; layer: third']")
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "Muon" in page.text_content("#vg-tooltip-element")


# --- singular values ------------------------------------------------------------------------------------------------


def values(page):
    "Singular values before and after, as the figure has them."
    told = circles(page, "singular value")
    return (torch.tensor([as_number(circle[name]) for circle in told]).double() for name in ("before", "after"))


@pytest.mark.site
@pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")
def test_iterations_are_those_of_the_library(open_chart):
    page = open_chart(SINGULAR)
    page.select_option("figure select[name=momentum]", label="value, second layer")
    for name in ("jordan", "polar_express"):
        page.select_option("figure select[name=coefficients]", label=name)
        press(page, "iterations", -8)
        for iterations in range(9):
            before, after = values(page)
            assert len(before) == 48
            expected = orthogonalize(before.diag(), iterations, name).diagonal()
            assert torch.allclose(after, expected, rtol=0.02, atol=1e-4), (name, iterations)
            inside = int(((after > 0.7) & (after < 1.2)).sum())
            told = page.text_content("figure svg .mark-text.role-mark")
            told = int(told.removesuffix(" of 48 are between 0.7 and 1.2"))
            assert abs(told - inside) <= 1  # one may be at the edge, to the four digits of the page
            press(page, "iterations", 1)
