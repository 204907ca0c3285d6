"""Run the code cells of a notebook, those for a GPU too, in this process: `python gpu_notebooks.py PATH`.

This needs neither Jupyter nor nbdev, which may be missing where a GPU is. Exit code 1, with the traceback, when a cell
fails. Cells with `#| eval: false`, and those with magics, are left out."""

import json
import linecache
import os
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path

NOT_RUN = re.compile(r"^(#\s*\|\s*eval:\s*false|[%!])", re.MULTILINE)
GPU = re.compile(r"^#\s*\|\s*gpu\b", re.MULTILINE)


def code_cells(path):
    "The sources of the code cells of a notebook."
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def gpu_notebooks(folder):
    "Paths of the notebooks below a folder that have cells for a GPU."
    return [path for path in sorted(Path(folder).rglob("*.ipynb")) if any(map(GPU.search, code_cells(path)))]


def stand_in_for_ipython():
    "Notebooks wrap what they show; where IPython is not installed, nothing is shown."
    display = types.ModuleType("IPython.display")
    for name in ("Markdown", "HTML", "SVG", "Image", "display"):
        setattr(display, name, lambda *values, **options: None)
    package = types.ModuleType("IPython")
    package.display = display
    sys.modules |= {"IPython": package, "IPython.display": display}


def run(path):
    "Run a notebook from top to bottom in its folder. Raises what a cell raises."
    path = Path(path).resolve()
    cells = code_cells(path)
    os.chdir(path.parent)
    if not find_spec("IPython"):
        stand_in_for_ipython()
    names = {"__name__": "__main__"}
    for number, source in enumerate(cells):
        if not NOT_RUN.search(source):
            title = f"{path.name}, code cell {number}"
            linecache.cache[title] = (len(source), None, source.splitlines(True), title)  # for tracebacks
            exec(compile(source, title, "exec"), names)


if __name__ == "__main__":
    run(sys.argv[1])
