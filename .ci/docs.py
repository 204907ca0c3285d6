"""Build the site into _docs/: with Quarto where it is present, otherwise with smalldocs, which needs no installation.

nbdev's own command would also write README.md, by Quarto, and so differently on each machine; here the parts are called
that concern the site.
"""

import argparse
import html
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import annotated_pages
import api_pages
import live_pages
import python_pages
import yaml
from folded_tables import fold_outputs
from lighter_site import lighten

ROOT = Path(__file__).resolve().parents[1]
REDIRECT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>This page has moved</title>
<link rel="canonical" href="{target}"><meta http-equiv="refresh" content="0; url={target}"></head>
<body><p>This page has moved: <a href="{target}">{target}</a></p></body></html>
"""


def process(builder, charts, exercises):
    """Notebooks as they appear on the site, in _proc/: documentation of what is exported, hidden cells gone. Always
    from scratch. The changelog becomes a page among them. What live figures show goes into the list `charts`, and
    what can be edited on a page into the list `exercises`."""
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    refresh_quarto_yml()
    # where torchao is installed, importing transformers would put a warning for its authors on pages
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    proc, config = proc_nbs(force=True, n_workers=0), get_config()  # in this process: libraries are imported once
    for page in sorted(proc.rglob("*.ipynb")):
        notebook = json.loads(page.read_text(encoding="utf-8"))
        api_pages.finish_page(notebook, ROOT / "nbs" / page.relative_to(proc))
        live_pages.with_pictures(notebook, charts)
        python_pages.with_marks(notebook, exercises)
        for cell in notebook["cells"]:
            finish_cell(cell, config, builder)
        page.write_text(json.dumps(notebook), encoding="utf-8")
    shutil.copy(ROOT / "CHANGELOG.md", proc / "changelog.md")
    write_settings(proc, builder)
    return proc


def with_values(text, config):
    "A text in which `{{< var NAME >}}` has become the value of NAME in settings.ini."
    return re.sub(r"\{\{<\s*var\s+(\w+)\s*>\}\}", lambda match: str(config[match[1]]), text)


def finish_cell(cell, config, builder):
    "What nbdev leaves to do in a cell: values of settings.ini are put in; tables need no script."
    text = with_values("".join(cell["source"]), config)
    if cell["cell_type"] == "raw" and builder == "smalldocs":
        text = re.sub(r"^output-file:.*\n", "", text, flags=re.MULTILINE)  # it has no such option, and needs none
    cell["source"] = text
    for output in cell.get("outputs", []):
        without_script(output.get("data", {}))
    fold_outputs(cell)


def without_script(data):
    """An HTML output as Markdown with that HTML in it: the page is the same, but Quarto takes every output of the type
    text/html for a widget, and then loads require.js and jQuery from elsewhere."""
    if "text/html" not in data or any(kind.startswith("image/") for kind in data):
        return
    table = re.sub(r"<style.*?</style>", "", "".join(data.pop("text/html")), flags=re.DOTALL)
    table = re.sub(r"\n\s*", "\n", table).strip()
    data.setdefault("text/markdown", f"```{{=html}}\n{table}\n```\n")


def write_settings(proc, builder):
    """The settings of the site, with values of settings.ini in them.

    smalldocs does not know two of them. Formulas become what Quarto makes of them in `with_mathml`, and the reader's
    preference for a dark page it follows without being told."""
    from nbdev.config import get_config

    settings, own = (ROOT / "_quarto.yml").read_text(encoding="utf-8"), proc / "_quarto.yml"
    if builder == "smalldocs":
        settings = re.sub(r"^ *(html-math-method|respect-user-color-scheme):.*\n", "", settings, flags=re.MULTILINE)
    (proc / "site.yml").write_text(with_values(settings, get_config()), encoding="utf-8")
    own.write_text(own.read_text(encoding="utf-8").replace("../_quarto.yml", "site.yml"), encoding="utf-8")


def mathml(formulas):
    "Pairs of a formula in LaTeX and 'display' or 'inline', as MathML by pandoc, as Quarto does it. None may fail."
    import pypandoc

    marks = {"display": "$$", "inline": "$"}
    text = "\n\n".join(f"{marks[kind]}{latex.strip()}{marks[kind]}" for latex, kind in formulas)
    command = [pypandoc.get_pandoc_path(), "--from", "markdown", "--to", "html", "--mathml", "--fail-if-warnings"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    found = re.findall(r"<math .*?</math>", done.stdout, flags=re.DOTALL)
    if done.returncode or len(found) != len(formulas):
        raise SystemExit(f"pandoc could not write all formulas as MathML:\n{done.stderr}")
    return [re.sub(r"<annotation.*?</annotation>", "", math, flags=re.DOTALL) for math in found]


def with_mathml(site):
    """Pages with their formulas as MathML, which browsers draw without a script from elsewhere.

    smalldocs leaves formulas as LaTeX, for KaTeX to draw."""
    formula = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.DOTALL)
    texts = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    formulas = sorted({(html.unescape(m[2]), m[1]) for text in texts.values() for m in formula.finditer(text)})
    drawn = dict(zip(formulas, mathml(formulas), strict=True))
    for page, text in texts.items():
        text = formula.sub(lambda m: f'<span class="math {m[1]}">{drawn[html.unescape(m[2]), m[1]]}</span>', text)
        text = re.sub(r"<(?:script|link)[^>]*katex[^>]*>(?:</script>)?\n?", "", text)
        page.write_text(text, encoding="utf-8")


def write_redirects(site):
    "A page at each old address that leads to the new one (see redirects.yml), where no page of today has that address."
    moved = yaml.safe_load((ROOT / ".ci" / "redirects.yml").read_text(encoding="utf-8"))
    for old, new in moved.items():
        if not (site / f"{new}.html").exists():
            raise SystemExit(f"redirects.yml: there is no page {new}")
        folder, name = PurePosixPath(old).parent, PurePosixPath(old).name
        for address in {folder / f"{name}.html", folder / (re.sub(r"^\d+[a-z]?_", "", name) + ".html")}:
            page = site / address
            if not page.exists():
                page.parent.mkdir(parents=True, exist_ok=True)
                target = os.path.relpath(site / f"{new}.html", page.parent)
                page.write_text(REDIRECT.format(target=PurePosixPath(target)), encoding="utf-8")


def render(builder, proc):
    "Run the builder in _proc/; ends the program with its exit code when it fails."
    commands = [["quarto", "render", "--no-cache"]]
    if builder == "smalldocs":
        smalldocs = [sys.executable, "-c", "from smalldocs.cli import main; raise SystemExit(main())"]
        commands = [[*smalldocs, "check", "."], [*smalldocs, "render", "."]]
    for command in commands:
        code = subprocess.run(command, cwd=proc).returncode
        if code:
            raise SystemExit(f"{builder} could not build the site (exit code {code}); its messages stand above.")
    if builder == "smalldocs":
        with_mathml(proc / "_docs")
        annotated_pages.with_numbers(proc / "_docs")
    write_redirects(proc / "_docs")
    lighten(proc / "_docs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "quarto" if shutil.which("quarto") else "smalldocs"
    parser.add_argument("--builder", choices=["quarto", "smalldocs"], default=default)
    builder = parser.parse_args().builder
    if builder == "smalldocs" and sys.version_info < (3, 11):
        raise SystemExit("The site needs Quarto 1.9 or later on the PATH, or Python 3.11 or later for smalldocs.")
    os.chdir(ROOT)
    charts, exercises = [], []
    proc = process(builder, charts, exercises)
    render(builder, proc)
    live_pages.with_charts(proc / "_docs", charts)
    python_pages.with_editors(proc / "_docs", exercises)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(proc / "_docs", ROOT / "_docs")
    print(f"The site, built with {builder}: {os.path.relpath(ROOT / '_docs' / 'index.html')}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # without IPython's farewell, which collects garbage once for each notebook, half a minute in all
