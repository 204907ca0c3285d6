"""Write README.md from nbs/index.ipynb, without Quarto; with --check only say whether it is up to date.

Saved outputs are kept and nothing is run. Links and pictures are relative to nbs/ in the notebook, so they get that prefix;
`{{< var NAME >}}` is the value of NAME in settings.ini, as on the site.
What only Quarto understands becomes plain Markdown: callouts turn into quotations, other divs and attributes go.
"""
import argparse
import difflib
import re
import sys
from configparser import ConfigParser
from pathlib import Path, PurePosixPath

import nbformat
import yaml
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NBS = "nbs"
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*(.*?)\s*$")
HIDDEN_CELL = {"hide", "include: false", "export", "exporti", "exports", "default_exp"}
HIDDEN_INPUT = {"echo: false", "hide_input"}
HIDDEN_OUTPUT = {"output: false", "hide_output"}
TEXT = ("text/markdown", "text/plain")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def directives(source):
    "The `#|` lines at the top of a code cell in one spelling, and the code below them."
    found, rest = set(), source.split("\n")
    while rest and (m := DIRECTIVE.match(rest[0])):
        key, colon, value = m[1].partition(":")
        words = key.split()
        if words:
            value = value.strip()
            found.add(f"{key.strip()}: {value.lower()}" if colon and value else words[0])
        rest.pop(0)
    return found, "\n".join(line for line in rest if not re.search(r"#\s*\|\s*hide_line\s*$", line)).strip("\n")


def target(link):
    "A link target of the notebook as seen from the root of the repository."
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|[#/]", link):
        return link
    parts = []
    for part in PurePosixPath(NBS, link).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def outside_code(text, change):
    "Apply `change` to the stretches of a Markdown line that are not inline code."
    return "".join(p if p.startswith("`") else change(p) for p in re.split(r"(`+[^`]*`+)", text))


def plain_line(line):
    "One line of Markdown with paths from the root and without Quarto's attributes."
    def image(m):
        alt = re.search(r'fig-alt="([^"]*)"', m[3] or "")
        return f"![{m[1] or (alt[1] if alt else '')}]({m[2]})"

    line = re.sub(r"!\[([^\]]*)\]\(([^)]+)\)(\{[^}]*\})?", image, line)
    line = re.sub(r"\[([^\]]+)\]\{[.#\w][^}]*\}", r"\1", line)  # a span
    line = re.sub(r"(?<=\))\{[.#\w][^}]*\}", "", line)  # attributes of a link
    if re.match(r"#+ ", line):
        line = re.sub(r"\s*\{[^}]*\}\s*$", "", line)
    line = re.sub(r'(\]\()(<?)([^)\s>]+)', lambda m: m[1] + m[2] + target(m[3]), line)
    return re.sub(r'\b(src|href)="([^"]+)"', lambda m: f'{m[1]}="{target(m[2])}"', line)


def plain(text):
    "Markdown for Quarto as plain Markdown. Fenced code passes untouched."
    out, divs, fence = [], [], None
    for line in text.split("\n"):
        quote = "> " * sum(divs)
        m = FENCE.match(line)
        if fence or m:
            if not fence:
                fence = m[1]
                line = re.sub(r"\{\.?([\w+-]*).*\}\s*$", r"\1", line)
            elif m and m[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = None
            out.append((quote + line).rstrip() if quote else line)
            continue
        div = re.match(r"^\s*:{3,}\s*(.*?)\s*$", line)
        if div and div[1]:
            callout = re.search(r"\.callout-(\w+)", div[1])
            divs.append(bool(callout))
            if callout:
                title = re.search(r'title="([^"]*)"', div[1])
                out += ["> " * sum(divs) + f"**{title[1] if title else callout[1].capitalize()}**", ("> " * sum(divs)).rstrip()]
        elif div:
            if not divs:
                raise SystemExit("index.ipynb: a ::: that closes nothing")
            divs.pop()
        else:
            line = quote + outside_code(line, plain_line)
            if line.strip("> "):
                out.append(line)
            elif out and out[-1].strip("> "):  # one blank line is enough where a div stood
                out.append(line.rstrip())
    if divs:
        raise SystemExit("index.ipynb: a ::: div is never closed")
    return "\n".join(out)


def heading(title, description):
    return f"# {title}" + (f"\n\n> {description}" if description else "")


def front_matter(cell):
    "Title and description of a raw cell of front matter, or of the cell with the title; None for any other cell."
    src = cell.source.strip()
    if cell.cell_type == "raw":
        found = re.fullmatch(r"---\s*\n(.*)\n---", src, re.DOTALL)
        return (yaml.safe_load(found[1]) or {}) if found else None
    title = re.match(r"#\s+(\S.*)", src)
    if cell.cell_type != "markdown" or not title:
        return None
    description = re.search(r"^>\s+(\S.*)$", src, re.MULTILINE)
    # nbdev makes front matter of this cell and drops the rest of it, so that text here would be missing on the site
    for line in src.splitlines()[1:]:
        if line.strip() and not re.match(r">\s|-\s+\S.*:.*\S", line):
            raise SystemExit(f"index.ipynb: the cell of the title holds more than the title and its `>` line: {line!r}")
    return {"title": title[1].strip(), "description": description[1].strip() if description else ""}


def outputs(cell):
    "Saved outputs that can be shown as text; of several forms the plainest."
    kept = []
    for out in cell.outputs:
        if out.output_type == "stream" and out.name == "stdout":
            out.text = ANSI.sub("", out.text)
            kept.append(out)
        elif out.output_type in ("execute_result", "display_data"):
            kind = next((k for k in TEXT if k in out.data), None)
            if any(k.startswith("image/") for k in out.data):
                raise SystemExit("index.ipynb: a cell's output is a picture; save it in nbs/images/ and show it with ![...](images/...)")
            if kind is None:
                continue
            text = out.data[kind]
            out.data = {kind: plain(text) if kind == "text/markdown" else ANSI.sub("", text)}
            out.metadata = {}
            kept.append(out)
        elif out.output_type == "error":
            raise SystemExit("index.ipynb: a saved output is an error")
    return kept


def settings(name):
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    if name not in cfg["DEFAULT"]:
        raise SystemExit(f"index.ipynb: settings.ini has no {name!r}")
    return cfg["DEFAULT"][name]


def convert(nb):
    "The notebook as the text of README.md."
    cells, title = [], None
    for cell in nb.cells:
        front = front_matter(cell) if title is None else None
        if front and "title" in front:
            title = front["title"]
            cells.append(nbformat.v4.new_markdown_cell(heading(title, front.get("description", ""))))
        elif cell.cell_type == "markdown":
            cell.source = plain(cell.source).strip()
            cells += [cell] if cell.source else []
        elif cell.cell_type == "code":
            found, cell.source = directives(cell.source)
            if found & HIDDEN_CELL or not cell.source:
                continue
            cell.outputs = [] if found & HIDDEN_OUTPUT else outputs(cell)
            cell.metadata["hide_source"] = bool(found & HIDDEN_INPUT)
            cells.append(cell)
    text = "\n\n".join(filter(None, map(export, cells))) + "\n"
    return re.sub(r"\{\{<\s*var\s+(\w+)\s*>\}\}", lambda m: settings(m[1]), text)


def export(cell):
    "One cell through nbconvert, without the blank lines it leaves around."
    nb = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python"}})
    config = Config()
    config.MarkdownExporter.exclude_input = cell.metadata.pop("hide_source", False)
    body, _ = MarkdownExporter(config=config).from_notebook_node(nb)
    lines = [line if line.strip() else "" for line in body.split("\n")]
    text = "\n".join(lines).strip("\n")
    return re.sub(r"\n{3,}", "\n\n", text) if cell.cell_type == "code" else text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and show the difference if README.md is out of date")
    args = parser.parse_args()
    source, readme = ROOT / NBS / "index.ipynb", ROOT / "README.md"
    if not source.exists():
        raise SystemExit(f"{NBS}/index.ipynb not found")
    new = convert(nbformat.read(source, as_version=4))
    old = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if new == old:
        return
    if not args.check:
        readme.write_text(new, encoding="utf-8")
        print("README.md written")
        return
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "nbs/index.ipynb"))
    raise SystemExit("README.md is not what nbs/index.ipynb produces. Run `make readme` and commit the result.")


if __name__ == "__main__":
    main()
