"""Pages of the reference as people read them: entries in our form (see internals/reference_entries) with a link to the
source, and folded away what is nothing but source.

Nothing is moved: a notebook has the order of its page, so that Jupyter and the site show the same. Its example imports
the package, and it calls show_doc itself, both before the code. The code keeps its own order, at the end. Such an
example would not notice that the package is older than its notebook, so a test compares the two (test_api_pages.py)."""

import ast
import json
import re
from functools import cache
from importlib import import_module

FOLD = '#| code-fold: show\n#| code-summary: "Exported source"\n'  # what nbdev writes above an exported cell


def documented(source):
    """The name that a cell gives to `show_doc`, and the level of the heading. A cell that nbdev has made says no level.
    None for any other cell."""
    match = re.search(r"^show_doc\((\w+)(?:, title_level=(\d))?\)$", source, flags=re.MULTILINE)
    return match and (match[1], match[2])


def finish_page(notebook, source_notebook):
    "Write the entries of a page anew, and fold source. The notebook that it was made of says what it exports."
    told, module = set(), exporting_module(source_notebook)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        entry = documented(source) if cell["cell_type"] == "code" else None
        if entry:
            name, level = entry
            cell["outputs"] = [entry_output(module, name, int(level or 3))]
            told |= {name} if level else set()
        elif source.startswith(FOLD):
            cell["source"] = folded(source, told)


def exporting_module(path):
    "The module that a notebook is exported to; None for one that exports nothing."
    text = "".join("".join(cell["source"]) + "\n" for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
    match = re.search(r"^#\| default_exp (\S+)$", text, flags=re.MULTILINE)
    return match and f"sgd_sai.{match[1]}".removesuffix(".__init__")


@cache
def lookup():
    "nbdev's table of names and their pages."
    from nbdev.doclinks import NbdevLookup

    return NbdevLookup()


def entry_output(module, name, level):
    "The entry of an exported name as the output of a cell, with a link to its source on GitHub."
    from sgd_sai.internals.reference_entries import ReferenceEntry

    thing = getattr(import_module(module), name)
    heading, _, rest = ReferenceEntry(thing, level)._repr_markdown_().partition("\n\n")
    address = lookup().code(name)
    link = f"[source]({address}){{.entry-source}}\n\n" if address else ""
    text, table, end = lookup().linkify(rest).partition("<table")
    html = f"```{{=html}}\n{table}{end}\n```\n" if table else ""
    data = {"text/markdown": f"{heading}\n\n{link}{text}{html}"}
    return {"output_type": "display_data", "metadata": {}, "data": data}


def folded(source, told):
    """Exported source, closed where it has nothing but private names, or names whose entry the page has placed itself
    (`told`). The line to click says what is inside."""
    code = source.removeprefix(FOLD)
    names = [node.name for node in ast.parse(code).body if hasattr(node, "name")]
    public = [name for name in names if not name.startswith("_") and name not in told]
    if public or not names:
        return source
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f'#| code-fold: true\n#| code-summary: "Source: {shown}"\n{code}'
