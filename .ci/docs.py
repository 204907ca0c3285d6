"""Build the site into _docs/: with Quarto where it is present, otherwise with smalldocs, which needs no installation of its own.

nbdev's own command would also write README.md, by Quarto, and so differently on each machine; here the parts are called that concern the site.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def process(builder):
    """Notebooks as they appear on the site, in _proc/: documentation of what is exported, hidden cells gone. Always from scratch.

    The changelog becomes a page among them. A page can name the repository as `{{< var git_url >}}`, or any other key of settings.ini, so that its owner stands there alone.
    """
    from nbdev.config import get_config
    from nbdev.doclinks import _build_modidx
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    refresh_quarto_yml()
    _build_modidx()
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # where torchao is installed, importing transformers would put a warning for its authors on pages
    proc, cfg = proc_nbs(force=True, n_workers=0), get_config()  # in this process, so that libraries are imported once
    for page in proc.rglob("*.ipynb"):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"\{\{<\s*var\s+(\w+)\s*>\}\}", lambda m: str(cfg[m[1]]), text)
        page.write_text(text if builder == "quarto" else without_output_file(text), encoding="utf-8")
    (proc / "changelog.md").write_text((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), encoding="utf-8")
    if builder == "smalldocs":
        without_math_method(proc)
    return proc


def without_math_method(proc):
    "smalldocs does not know how Quarto is told to write formulas, and complains about it; `with_mathml` does the same afterwards."
    own = proc / "_quarto.yml"
    settings = [line for line in (ROOT / "_quarto.yml").read_text(encoding="utf-8").splitlines(True) if "html-math-method" not in line]
    (proc / "site.yml").write_text("".join(settings), encoding="utf-8")
    own.write_text(own.read_text(encoding="utf-8").replace("../_quarto.yml", "site.yml"), encoding="utf-8")


def without_output_file(text):
    "nbdev names a page without the number of its notebook, which smalldocs does not know how to do and complains about."
    nb = json.loads(text)
    for cell in nb["cells"]:
        if cell["cell_type"] == "raw":
            lines = "".join(cell["source"]).splitlines(keepends=True)
            cell["source"] = [line for line in lines if not line.startswith("output-file:")]
    return json.dumps(nb)


def with_mathml(page):
    """A page with its formulas as MathML, as Quarto writes them (`html-math-method: mathml`): browsers draw that without a script from elsewhere.

    smalldocs leaves formulas as LaTeX, for KaTeX to draw in the browser. A formula that cannot be converted stops the build."""
    from latex2mathml.converter import convert

    def formula(m):
        return f'<span class="math {m[1]}">{convert(html.unescape(m[2]), display="block" if m[1] == "display" else "inline")}</span>'

    text = page.read_text(encoding="utf-8")
    new = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, text, flags=re.DOTALL)
    new = re.sub(r'<(?:script|link)[^>]*katex[^>]*>(?:</script>)?\n?', "", new)
    if new != text:
        page.write_text(new, encoding="utf-8")


def commands(builder):
    "What to run in _proc/."
    if builder == "quarto":
        return [["quarto", "render", "--no-cache"]]
    smalldocs = [sys.executable, "-c", "from smalldocs.cli import main; raise SystemExit(main())"]
    return [[*smalldocs, "check", "."], [*smalldocs, "render", "."]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builder", choices=["quarto", "smalldocs"], default="quarto" if shutil.which("quarto") else "smalldocs")
    builder = parser.parse_args().builder
    if builder == "smalldocs" and sys.version_info < (3, 11):
        raise SystemExit("The site needs Quarto 1.9 or later on the PATH, or Python 3.11 or later for smalldocs.")

    os.chdir(ROOT)
    proc = process(builder)
    for command in commands(builder):
        code = subprocess.run(command, cwd=proc).returncode
        if code:
            raise SystemExit(f"{builder} could not build the site (exit code {code}); its messages stand above.")
    if builder == "smalldocs":
        for page in (proc / "_docs").rglob("*.html"):
            with_mathml(page)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(proc / "_docs", ROOT / "_docs")
    print(f"The site, built with {builder}: {os.path.relpath(ROOT / '_docs' / 'index.html')}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # without IPython's farewell, which collects garbage once for each notebook, half a minute in all
