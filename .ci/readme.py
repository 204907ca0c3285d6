"""Write README.md from nbs/index.ipynb: nbconvert's Markdown, without hidden cells, with links seen from the root.

Nothing is run: saved outputs are kept. `{{< var NAME >}}` is the value of NAME in settings.ini, as on the site.
"""

import re
from configparser import ConfigParser
from pathlib import Path, PurePosixPath

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NBS = "nbs"
HIDDEN_CELL = re.compile(r"^#\s*\|\s*(hide|export\w*|default_exp.*|include:\s*false)\s*$", re.MULTILINE)
HIDDEN_INPUT = re.compile(r"^#\s*\|\s*echo:\s*false\s*$", re.MULTILINE)
DIRECTIVES = re.compile(r"^#\s*\|.*\n?", re.MULTILINE)


def link_from_root(match):
    "A relative link or picture of the notebook, whose place is nbs/, as seen from the root of the repository."
    before, link = match.groups()
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|[#/]", link):
        return match[0]
    parts = []
    for part in PurePosixPath(NBS, link).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return before + "/".join(parts)


def plain_markdown(text):
    "Quarto's Markdown as plain Markdown: no attributes in braces, links from the root. Code stays as it is."
    if ":::" in text:
        raise SystemExit("index.ipynb: README.md cannot show a ::: block; write it as plain Markdown")
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<=\))\{[^}]*\}", "", parts[i])
        parts[i] = re.sub(r"(\]\()([^)\s]+)", link_from_root, parts[i])
    return "".join(parts)


def prepared(cell):
    "A cell as nbconvert should show it; None for a hidden one."
    if cell.cell_type == "markdown":
        cell.source = plain_markdown(cell.source)
        return cell
    if cell.cell_type != "code" or HIDDEN_CELL.search(cell.source):
        return None
    if HIDDEN_INPUT.search(cell.source):
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
    cell.source = DIRECTIVES.sub("", cell.source)
    for output in cell.outputs:
        if "text/markdown" in output.get("data", {}):
            output.data["text/markdown"] = plain_markdown(output.data["text/markdown"])
    return cell


def readme():
    "The text of README.md."
    notebook = nbformat.read(ROOT / NBS / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [cell for cell in map(prepared, notebook.cells) if cell is not None]
    config = Config()
    config.TagRemovePreprocessor.remove_input_tags = {"hide-input"}
    config.MarkdownExporter.preprocessors = ["nbconvert.preprocessors.TagRemovePreprocessor"]
    text, _ = MarkdownExporter(config=config).from_notebook_node(notebook)
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    text = re.sub(r"\{\{<\s*var\s+(\w+)\s*>\}\}", lambda match: settings["DEFAULT"][match[1]], text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
