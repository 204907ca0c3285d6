"""What holds on every page of the site: it fits its window, it asks no other host for anything, it is light, it can be
read without scripts, and its sidebar has what belongs to its part."""

import gzip
import html
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import yaml
from pages import NBS, ROOT, notebooks, page_name

sys.path.insert(0, str(ROOT / ".ci"))

pytestmark = [pytest.mark.site, pytest.mark.skipif(sys.version_info < (3, 11), reason="smalldocs needs Python 3.11")]

BARS = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
BEYOND = """() => {
    const width = document.documentElement.clientWidth, found = [];
    if (document.documentElement.scrollWidth > width) found.push("the page");
    for (const element of document.querySelectorAll("main *")) {
        if (element.getBoundingClientRect().right <= width + 1) continue;
        let box = element;
        while (box && !/auto|scroll/.test(getComputedStyle(box).overflowX)) box = box.parentElement;
        if (!box) found.push(element.tagName + "." + element.className);
    }
    return found.slice(0, 3);
}"""


def addresses(site):
    "Addresses of all pages, without those that lead to a new address."
    names = [*map(page_name, notebooks()), "changelog"]
    assert all((site / f"{name}.html").exists() for name in names)
    return [f"{name}.html" for name in names]


def listed(entries):
    "The pages of a sidebar, in its order."
    for entry in entries:
        if "href" in entry:
            yield entry["href"].rpartition(".")[0] + ".html"
        yield from listed(entry.get("contents", []))


# --- in a browser ---------------------------------------------------------------------------------------------------


def test_every_page_fits_its_window_and_asks_no_other_host(browser, site, site_url):
    """At the width of a phone and of a desk: nothing reaches beyond the window unless it scrolls inside of itself, for
    what is cut cannot be read. One page of the browser opens all, which is quick."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, foreign, beyond = context.new_page(), set(), []

    def refuse(route):
        foreign.add(route.request.url)
        route.abort()

    page.route(lambda url: url.startswith("http") and not url.startswith(site_url), refuse)
    for address in addresses(site):
        page.goto(f"{site_url}/{address}")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            if found := page.evaluate(BEYOND):
                beyond.append((address, width, found))
    context.close()
    assert beyond == [] and foreign == set()


@pytest.mark.parametrize("address", ["index", "optimizers/sgd_sai", "tutorials/replace_adamw", "reports/scoreboard"])
def test_pages_can_be_read_without_scripts(open_page, address):
    page = open_page(f"{address}.html", scripts=False)
    paragraph = page.locator("main p").filter(has_text=re.compile(".{60}")).first
    assert page.locator("main h1").first.is_visible() and paragraph.is_visible() and page.foreign == []


def test_first_visit_of_the_landing_page_is_light(browser, site_url):
    "All bytes that come over the network, as the browser counts them, from a server that compresses nothing."
    context = browser.new_context()
    page = context.new_page()
    session, received = context.new_cdp_session(page), []
    session.send("Network.enable")
    session.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
    page.goto(f"{site_url}/index.html")
    page.wait_for_load_state("networkidle")
    context.close()
    assert len(received) > 5 and sum(received) < 600e3


def test_figures_turn_dark_with_the_page_and_photographs_do_not(open_page):
    def filters(address, scheme):
        page = open_page(address, scheme=scheme)
        return set(page.eval_on_selector_all("main img", "all => all.map(i => getComputedStyle(i).filter)"))

    assert filters("reports/ten_optimizers.html", "light") == {"none"}
    (turned,) = filters("reports/ten_optimizers.html", "dark")
    assert "invert" in turned and "hue-rotate(180deg)" in turned
    assert filters("experiments/tasks/vision.html", "dark") == {"none"}  # images of clothes


def test_formulas_have_a_font_that_draws_roots(open_page):
    page = open_page("optimizers/gsnr.html")
    page.evaluate("document.fonts.ready")
    loaded = page.evaluate("[...document.fonts].filter(f => f.status == 'loaded').map(f => f.family)")
    assert any("STIX Two Math" in name for name in loaded)
    tallest = max(root.bounding_box()["height"] for root in page.locator("msqrt").all() if root.is_visible())
    assert tallest > 30  # as tall as the sum under it


# --- the files ------------------------------------------------------------------------------------------------------


def test_font_has_the_characters_of_all_formulas(site):
    told = (NBS / "fonts" / "stix-two-math.txt").read_text(encoding="utf-8")
    ranges = [(int(low, 16), int(high or low, 16)) for low, high in re.findall(r"U\+(\w+)(?:-(\w+))?", told)]
    formulas = [math for page in addresses(site) for math in re.findall(r"<math.*?</math>", text_of(site, page), re.S)]
    used = set(html.unescape(re.sub(r"<[^>]*>|\s", "", "".join(formulas))))
    assert len(used) > 90 and {sign for sign in used if not any(a <= ord(sign) <= b for a, b in ranges)} == set()


def text_of(site, address):
    return (site / address).read_text(encoding="utf-8")


def test_search_index_is_light_and_without_internals(site):
    index = (site / "search.json").read_bytes()
    found = {entry["href"].partition("#")[0] for entry in json.loads(index)}
    assert len(gzip.compress(index)) < 150e3
    assert not any(address.startswith("internals/") for address in found)
    missing = {address for bar in BARS[:3] for address in listed(bar["contents"])} - found
    assert missing == set() and "experiments/train.html" in found


class Sidebar(HTMLParser):
    "The addresses in the sidebar of a page, and in its navbar."

    def __init__(self, text):
        super().__init__()
        self.inside, self.links = [], {"quarto-sidebar": [], "quarto-header": []}
        self.feed(text.partition("<main")[0])

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("nav", "header"):
            self.inside.append(attrs.get("id"))
        for name in set(self.inside) & self.links.keys():
            self.links[name] += [attrs["href"]] if tag == "a" and attrs.get("href") else []

    def handle_endtag(self, tag):
        if tag in ("nav", "header"):
            self.inside.pop()


def test_every_page_has_the_sidebar_of_its_part(site):
    assert [bar["id"] for bar in BARS] == ["learn", "use", "results", "develop"]
    for bar in BARS:
        pages = list(listed(bar["contents"]))
        for address in pages:
            links = Sidebar(text_of(site, address)).links["quarto-sidebar"]
            shown = [((site / address).parent / link).resolve().relative_to(site).as_posix() for link in links]
            assert shown == pages, address
    develop = set(listed(BARS[-1]["contents"]))
    assert {f"{page_name(path)}.html" for path in notebooks() if path.parent.name == "internals"} <= develop


def test_navbar_leads_to_the_parts_and_to_the_repository(site):
    links = Sidebar(text_of(site, "index.html")).links["quarto-header"]
    for bar in BARS:
        assert set(listed(bar["contents"])) & set(links), bar["id"]
    assert any(re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+", link) for link in links)


# --- tables ---------------------------------------------------------------------------------------------------------


def visible_tables(text):
    "The tables of a page that are not folded away, each as its rows of cells."
    text = re.sub(r"<details.*?</details>", "", text, flags=re.DOTALL)
    for table in re.findall(r"<table.*?</table>", text, flags=re.DOTALL):
        rows = re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL)
        yield [re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL) for row in rows]


def test_tables_of_reports_show_six_columns_and_fold_the_rest(site):
    wide, folds = [], 0
    for address in listed(BARS[2]["contents"]):
        text = text_of(site, address)
        folds += text.count("<summary>All ")
        wide += [(address, table[0]) for table in visible_tables(text) if len(table[0]) > 6]
    assert wide == [] and folds > 20


def test_verdicts_of_the_scoreboard_come_second_with_a_sign_and_a_colour(open_page, site):
    boards = [table for table in visible_tables(text_of(site, "reports/scoreboard.html")) if "claim<" in table[0][0]]
    assert len(boards) == 6 and all("verdict" in row[1] for table in boards for row in table)
    page = open_page("reports/scoreboard.html")
    told = page.eval_on_selector_all(".verdict", "all => all.map(v => [v.textContent[0], getComputedStyle(v).color])")
    assert len({sign for sign, _ in told}) == len({color for _, color in told}) == len(set(map(tuple, told))) > 3


def test_a_wide_table_keeps_its_cells_when_it_is_folded():
    from folded_tables import fold_tables

    wide = "\n".join(
        ["Words", "", "| a | b\\|c | d | e | f | g | h |", "|---|---|---|---|---|---|---|", "| 1 " * 7 + "|"]
    )
    front, rest = fold_tables(wide).split("<details>")
    assert "| a | b\\|c | d | e | f | g |\n" in front and "| 1 | 1 | 1 | 1 | 1 | 1 |\n" in front
    assert rest.startswith("<summary>All 7 columns</summary>\n\n| a |") and wide.split("\n")[2] in rest
    assert fold_tables("| a | b |\n|---|---|\n| 1 | 2 |\n") == "| a | b |\n|---|---|\n| 1 | 2 |\n"


def test_style_sheets_keep_what_pages_use():
    from lighter_site import used_rules

    sheet = """@import url(https://fonts.example/css); .used, .not:hover { color: red } .used .not { color: blue }
        @media print { .not { color: red } } a:not(.not) { color: red } @media screen { #here { color: red } }
        .w-1\\/2 { color: red }"""
    kept = re.sub(r"\s", "", used_rules(sheet, {"used", "here"}))
    assert kept == ".used{color:red}a:not(.not){color:red}@mediascreen{#here{color:red}}"
