"""The site as a reader meets it: links lead somewhere, pictures say what they show, formulas are drawn, and a browser
has nothing to complain about.

The browser is Debian's chromium (or any that calls itself so), driven by playwright; where there is none its tests are
skipped and say so."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from pages import ROOT, notebooks, page_name

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = {
    "landing": "index.html",
    "tutorial": "tutorials/scaling_at_initialization.html",
    "report": "reports/ten_optimizers.html",
    "reference": "optimizers/sgd_sai.html",
}

pytestmark = [pytest.mark.site, pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")]


def copy_repository(target):
    "Copy the files that git tracks or would track."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in set(listed.stdout.split("\0")) - {""}:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The built site. It is built once, however many processes share the tests."
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    copy, log = shared / "site", shared / "site.log"
    with FileLock(shared / "site.lock"):
        if not log.exists():
            copy_repository(copy)
            command = [sys.executable, ".ci/docs.py", "--builder", "smalldocs"]
            done = subprocess.run(command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            log.write_text(f"{done.returncode}\n{done.stdout}")
    told = log.read_text()
    assert told.startswith("0\n"), told
    return copy / "_docs"


class Page(HTMLParser):
    "Links, identifiers, pictures and visible text of a page."

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.images, self.text, self.inside = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "style", "code", "pre"):
            self.inside.append(tag)
        self.anchors += [attrs["id"]] if attrs.get("id") else []
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        if tag == "img":
            self.images.append(attrs)

    @property
    def is_redirect(self):
        return "This page has moved" in "".join(self.text)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


@pytest.fixture(scope="session")
def pages(site):
    "All pages but those at old addresses, which lead to a new one."
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    return {path: page for path, page in pages.items() if not page.is_redirect}


def test_every_notebook_has_its_page(site, pages):
    addresses = {path.relative_to(site).with_suffix("").as_posix() for path in pages}
    assert set(map(page_name, notebooks())) <= addresses and (site / "llms.txt").exists()


def test_old_addresses_redirect(site):
    for old in (
        "01_optimizer",
        "optimizer",
        "experiments/18_peers",
        "experiments/shakespeare",
        "tutorials/03_replace_adamw",
    ):
        page = site / f"{old}.html"
        target = re.search(r'http-equiv="refresh" content="0; url=([^"]+)"', page.read_text(encoding="utf-8"))[1]
        assert (page.parent / target).resolve().exists()


def test_anchors_are_unique(site, pages):
    double = {}
    for path, page in pages.items():
        found = [anchor for anchor, count in Counter(page.anchors).items() if count > 1]
        if found:
            double[path.relative_to(site).as_posix()] = found
    assert double == {}


def test_no_output_makes_quarto_load_scripts(site):
    "It loads require.js and jQuery, from elsewhere, for a page with an output of one of these types."
    types = {"text/html", "application/javascript"}
    loud = []
    for path in (site.parent / "_proc").rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            loud += [path.name for output in cell.get("outputs", []) if types & output.get("data", {}).keys()]
    assert loud == []


def test_links_and_anchors_lead_somewhere(site, pages):
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if (
                not target.exists()
                or parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].anchors
            ):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_every_picture_says_what_it_shows(site, pages):
    silent = [
        f"{path.relative_to(site)}: picture {i + 1}"
        for path, page in pages.items()
        for i, image in enumerate(page.images)
        if not (image.get("alt") or "").strip()
    ]
    assert sum(len(page.images) for page in pages.values()) > 50 and silent == []


def test_formulas_are_drawn_without_a_script_from_elsewhere(site, pages):
    texts = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in pages}
    assert [
        name for name, text in texts.items() if re.search(r'<span class="math \w+">\\', text) or "katex" in text
    ] == []
    assert sum(text.count("<math") for text in texts.values()) > 300


@pytest.mark.parametrize(
    "noise",
    [
        "AUTOGENERATED",
        "Traceback (most recent call last)",
        "$$",
        "\\frac",
        "\\sqrt",
        ".ipynb)",
        ".ipynb#",
        "| |",
    ],
)
def test_no_noise_on_the_pages(site, pages, noise):
    assert [path.relative_to(site).as_posix() for path, page in pages.items() if noise in "".join(page.text)] == []


def test_signatures_show_no_addresses(pages):
    "A name in backticks in the comment of a parameter becomes a link, of which a signature shows the source."
    assert [
        path.stem for path in pages if "](https://" in re.sub(r"<[^>]*>", "", path.read_text(encoding="utf-8"))
    ] == []


def test_landing_page_is_light(site, pages):
    "What has to come before the first page can be seen: the page, its pictures, style sheets and scripts."
    landing = site / "index.html"
    parts = {landing} | {
        (site / link).resolve()
        for link in pages[landing].links
        if re.search(r"\.(css|js|png|svg|jpg)$", link) and not urlsplit(link).scheme
    }
    assert sum(path.stat().st_size for path in parts) < 1.5e6


@pytest.mark.skipif(BROWSER is None, reason="no chromium: install it to have the pages opened in a browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", PAGES)
def test_in_a_browser(site, kind, width, scheme):
    from playwright.sync_api import sync_playwright

    shots = ROOT / "build" / "screenshots"
    shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--allow-file-access-from-files"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said = []
        page.on("console", lambda message: message.type == "error" and said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.route(re.compile("^https?:"), lambda route: route.abort())  # the badge of Colab is elsewhere
        page.goto((site / PAGES[kind]).as_uri())
        page.wait_for_load_state("load")
        page.screenshot(path=shots / f"{kind}-{scheme}-{width}.png", full_page=True)

        own = [
            image for image in page.query_selector_all("main img") if not image.get_attribute("src").startswith("http")
        ]
        assert own or kind == "reference"
        assert all(image.evaluate("i => i.complete && i.naturalWidth > 0") for image in own)
        assert page.query_selector_all("math") or kind == "report"
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 1, f"the page is {overflow} pixels wider than the window"
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", color)[:3])) < 380
        assert dark == (scheme == "dark")
        if width > 1000:
            page.click("[aria-label=Search]")
            page.fill("input[type=search]", "AdaHessian")
            page.wait_for_selector(".smalldocs-search-results a", timeout=10_000)
        assert [text for text in said if "ERR_FAILED" not in text] == []
        browser.close()
