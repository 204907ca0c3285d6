"""Whether a notebook's saved outputs are what its cells print now.

Text has to be equal, up to white space and addresses in memory. Numbers with a decimal point or an exponent have to
agree to one percent, since their last digits depend on the processor; whole numbers have to be equal. Of pictures only
their presence counts, of a chart its specification, with all the numbers in it. A cell whose numbers are measured, such
as times, is marked with the tag `nbval-ignore-output`, the one that the nbval plugin of pytest knows.
"""

import html
import json
import math
import re

IGNORE_TAG = "nbval-ignore-output"
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
CHART = "application/vnd.vegalite.v5+json"
RELATIVE, ABSOLUTE = 0.01, 1e-6
TEXT_TYPES = ("text/markdown", "text/html", "text/plain")  # of several forms the first one is compared


def as_text(value):
    "Notebook text, which is a string or a list of lines, as a string."
    return value if isinstance(value, str) else "".join(value)


def shown_text(data):
    "The text of one display, the specification of a chart, or a word for a picture."
    if CHART in data:
        return json.dumps(data[CHART], sort_keys=True)
    if any(kind.startswith("image/") for kind in data):
        return "<picture>"
    kind = next((kind for kind in TEXT_TYPES if kind in data), None)
    text = as_text(data[kind]) if kind else ""
    if kind == "text/html":
        text = html.unescape(re.sub(r"<style.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL))
    return text


def normalized(text):
    "Text with white space folded, and without colours and addresses in memory."
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    text = re.sub(r"0x[0-9a-f]{6,}", "0x", text)
    return " ".join(text.split())


def printed_and_shown(outputs):
    "What a cell printed, as one text, and what it displayed, as a list of texts."
    printed, shown = "", []
    for output in outputs:
        if output["output_type"] == "stream":
            printed += as_text(output["text"]) if output["name"] == "stdout" else ""
        elif output["output_type"] in ("display_data", "execute_result"):
            shown.append(normalized(shown_text(output["data"])))
    return normalized(printed), shown


def numbers_agree(saved, now):
    "True if two numbers, as texts, are the same within the tolerance; whole numbers have to be equal."
    if saved == now:
        return True
    if re.fullmatch(r"[-+]?[\d,]+", saved) and re.fullmatch(r"[-+]?[\d,]+", now):
        return False
    a, b = (float(text.replace(",", "")) for text in (saved, now))
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def texts_agree(saved, now):
    "True if two texts are equal up to numbers that agree."
    if saved == now:
        return True
    if NUMBER.sub("#", saved) != NUMBER.sub("#", now):
        return False
    return all(map(numbers_agree, NUMBER.findall(saved), NUMBER.findall(now)))


def differences(cell, saved, now):
    "Lines that say how the outputs of a cell differ; none where the cell is marked as measured."
    if IGNORE_TAG in cell.get("metadata", {}).get("tags", []) or "".join(cell.source).rstrip().endswith(";"):
        return []
    (saved_print, saved_shown), (now_print, now_shown) = printed_and_shown(saved), printed_and_shown(now)
    pairs = [(saved_print, now_print)]
    if len(saved_shown) != len(now_shown):
        return [f"shows {len(now_shown)} things, and {len(saved_shown)} are saved"]
    pairs += zip(saved_shown, now_shown, strict=True)
    return [f"saved: {a[:600]}\n  now:   {b[:600]}" for a, b in pairs if not texts_agree(a, b)]
