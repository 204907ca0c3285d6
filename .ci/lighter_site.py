"""Make a built site light, whichever builder has written it.

What no page uses is taken out of style sheets and of the font of icons, pictures have as many colours as they need, the
search index leaves out what few look for, and nothing is asked of another host."""

import json
import logging
import re
from pathlib import Path

import tinycss2
import yaml
from fontTools import subset
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SECTION_TEXT = 600  # characters of a section that can be searched
COLORS = 192  # in a figure
ICON = re.compile(r'content:\s*"(?:\\([0-9a-f]{4,5})|([\ue000-\uf8ff]))"')


def lighten(site):
    "All of it, for a site in this folder."
    words = used_words(site)
    sheets = sorted((site / "site_libs").rglob("*.css"))
    for sheet in sheets:
        sheet.write_text(used_rules(sheet.read_text(encoding="utf-8"), words), encoding="utf-8")
    keep_icons(sheets)
    for picture in site.rglob("*.png"):
        with_few_colors(picture)
    index = site / "search.json"
    entries = short_index(json.loads(index.read_text(encoding="utf-8")))
    index.write_text(json.dumps(entries, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


# --- style sheets ---------------------------------------------------------------------------------------------------


def used_words(site):
    "Classes and identifiers of all pages, and every word of all scripts, which may set classes too."
    words = set()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        scripts = re.findall(r"<script\b[^>]*>(.*?)</script>", text, flags=re.DOTALL)
        for part in [*re.findall(r'\b(?:class|id)="([^"]*)"', text), *scripts]:
            words.update(re.findall(r"[\w-]+", part))
    for script in site.rglob("*.js"):
        words.update(re.findall(r"[\w-]+", script.read_text(encoding="utf-8")))
    return words


def is_used(name, words):
    "True if a class or an identifier is among the words, or its beginning, to which a script may add the rest."
    beginnings = [name[: place + 1] for place, sign in enumerate(name) if sign == "-" and place]
    return name in words or any(beginning in words for beginning in beginnings)


def may_match(selector, words):
    "False if a selector asks for a class or an identifier that is nowhere."
    asked = re.sub(r"\[[^\]]*\]|:(?:not|is|where|has)\([^)]*\)", "", selector)
    return all(is_used(name.replace("\\", ""), words) for name in re.findall(r"[.#]((?:[\w-]|\\.)+)", asked))


def used_rules(sheet, words):
    "A style sheet without rules that match nothing, without comments, and without imports from other hosts."
    kept = []
    for rule in tinycss2.parse_stylesheet(sheet, skip_comments=True, skip_whitespace=True):
        if rule.type == "qualified-rule":
            selectors = re.split(r",(?![^(]*\))", tinycss2.serialize(rule.prelude))
            selectors = [selector.strip() for selector in selectors if may_match(selector, words)]
            if selectors:
                kept.append(f"{','.join(selectors)}{{{tinycss2.serialize(rule.content).strip()}}}")
        elif rule.type == "at-rule" and rule.at_keyword in ("media", "supports", "layer") and rule.content is not None:
            inside = used_rules(tinycss2.serialize(rule.content), words)
            kept += [f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{inside}}}"] if inside else []
        elif not (rule.type == "at-rule" and rule.at_keyword == "import" and "//" in rule.serialize()):
            kept.append(rule.serialize())
    return "\n".join(kept)


def keep_icons(sheets):
    "The font of icons with those alone that style sheets name. It is written as woff, which needs no other package."
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it tells of what it mends
    texts = {sheet: sheet.read_text(encoding="utf-8") for sheet in sheets}
    icons = [int(code, 16) if code else ord(sign) for text in texts.values() for code, sign in ICON.findall(text)]
    for sheet, text in texts.items():
        for name in re.findall(r"url\([\"']?([^\"')?]*bootstrap-icons\.woff)\b(?!2)", text):
            options = subset.Options(flavor="woff", notdef_outline=True)
            font = subset.load_font(sheet.parent / name, options)
            chosen = subset.Subsetter(options)
            chosen.populate(unicodes=icons)
            chosen.subset(font)
            subset.save_font(font, sheet.parent / name, options)
            (sheet.parent / f"{name}2").unlink(missing_ok=True)
            sheet.write_text(re.sub(r"url\([^)]*\.woff2[^)]*\)\s*format\([^)]*\),?\s*", "", text), encoding="utf-8")


# --- pictures and search --------------------------------------------------------------------------------------------


def with_few_colors(path):
    "Write a picture, on white, with a palette, where that makes the file smaller."
    before = path.read_bytes()
    with Image.open(path) as picture:
        layers = picture.convert("RGBA")
    white = Image.new("RGBA", layers.size, "white")
    palette = Image.alpha_composite(white, layers).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)
    if path.stat().st_size >= len(before):
        path.write_bytes(before)


def sections():
    "The sidebar that lists it, and the heading there, of every page."
    bars = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    found = {}

    def visit(entries, place):
        for entry in entries:
            if "href" in entry:
                found[entry["href"].rpartition(".")[0]] = place
            visit(entry.get("contents", []), (place[0], entry.get("section", "")))

    for bar in bars:
        visit(bar["contents"], (bar["id"], ""))
    return found


def short_index(entries):
    """The search index without internals. Of the other pages for developers the beginning can be searched, of all the
    rest the first lines of each section."""
    places, kept = sections(), []
    for entry in entries:
        page, _, anchor = entry["href"].partition("#")
        bar, heading = places.get(page.removesuffix(".html"), ("", ""))
        if heading != "Internals" and not (bar == "develop" and anchor):
            kept.append({**entry, "text": entry["text"][:SECTION_TEXT]})
    return kept
