"The notebooks of the site, as the tests of this folder read them."

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
EXPORTED = re.compile(r"#\s*\|\s*exports?\b")


def notebooks():
    "Paths of all notebooks, without the copies that Jupyter and the builders keep."
    paths = NBS.rglob("*.ipynb")
    return sorted(p for p in paths if not any(part.startswith(("_", ".")) for part in p.relative_to(NBS).parts))


def page_name(path):
    "A notebook as its address on the site, without the ending."
    return path.relative_to(NBS).with_suffix("").as_posix()


def cells(path, kind):
    "The cells of one notebook of this kind, 'code' or 'markdown', each with its source as one text."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == kind:
            yield cell, "".join(cell["source"])


def code_cells():
    "Name of the page, and source, of every code cell of the site."
    for path in notebooks():
        for _, source in cells(path, "code"):
            yield page_name(path), source
