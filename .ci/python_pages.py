"""The site's part of an exercise (see nbs/explore/write_it_yourself.ipynb): its cell can be edited and run on the page.

The cell with the tag `exercise` becomes an editor, the one with the tag `answer` has what its third button shows, and
the output of the one with the tag `expected` is what the check compares with. Python in the browser is Brython, which
the site serves itself. It is loaded when a reader presses Run. Without scripts the cell is code like any other.
"""

import json
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path

HERE = Path(__file__).parent
CHECK = HERE.parent / "sgd_sai" / "explore" / "written_step.py"
MARK = re.compile(r'<div\b[^>]*\bdata-exercise="(\d+)"[^>]*>')
DIRECTIVES = re.compile(r"^#\|.*\n", flags=re.MULTILINE)


def with_marks(notebook, exercises):
    "Put a mark before the cell of an exercise in a notebook, and what its editor needs into the list `exercises`."
    tagged = {tag: cell for cell in notebook["cells"] for tag in cell["metadata"].get("tags", ())}
    if "exercise" not in tagged:
        return
    place = notebook["cells"].index(tagged["exercise"])
    mark = f'```{{=html}}\n<div class="python-exercise" data-exercise="{len(exercises)}"></div>\n```\n'
    notebook["cells"].insert(place, {"cell_type": "markdown", "metadata": {}, "source": mark})
    exercises.append(
        {
            "cell": source(tagged["exercise"]),
            "answer": source(tagged["answer"]),
            "expected": json.loads("".join(tagged["expected"]["outputs"][0]["text"])),
        }
    )


def source(cell):
    "The code of a cell, without lines for the builders."
    return DIRECTIVES.sub("", "".join(cell["source"])).strip() + "\n"


def with_editors(site, exercises):
    "Put the exercises and the script that edits them into the rendered pages that have one, and Python into the site."
    for page in site.rglob("*.html") if exercises else ():
        text = page.read_text(encoding="utf-8")
        if not MARK.search(text):
            continue
        text = MARK.sub(lambda mark: mark[0] + as_script(exercises[int(mark[1])]), text)
        folder = os.path.relpath(site, page.parent).replace(os.sep, "/")
        tag = f'<script defer src="{folder}/python/python-pages.js"></script>\n</body>'
        page.write_text(text.replace("</body>", tag), encoding="utf-8")
    if exercises:
        write_python(site / "python")


def as_script(exercise):
    "An exercise as a script that is not run. No text in it can end the script."
    return f'<script type="application/json">{json.dumps(exercise).replace("<", chr(92) + "u003c")}</script>'


def write_python(folder):
    "Brython, the modules that the exercise may import, and the scripts of the editor."
    data = files("brython") / "data"
    library = (data / "brython_stdlib.js").read_text(encoding="utf-8")
    library = json.loads(re.search(r"var scripts = (\{.*\})\n", library, flags=re.DOTALL)[1])
    modules = {name: library[name] for name in ("math", "sys")}
    for name, path in {
        "numpy": HERE / "browser_numpy.py",
        "written_step": CHECK,
        "run_cell": HERE / "browser_cell.py",
    }.items():
        modules[name] = [".py", path.read_text(encoding="utf-8"), []]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modules.js").write_text(f"__BRYTHON__.loadBrythonPackage({json.dumps(modules)});\n", encoding="utf-8")
    (folder / "brython.js").write_bytes((data / "brython.js").read_bytes())
    for name in ("python-pages.js", "python-worker.js"):
        shutil.copy(HERE / name, folder / name)
