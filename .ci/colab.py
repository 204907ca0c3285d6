"""Write the link to Colab and the installation there into the tutorials, as their second and third cell.

Both are made of settings.ini."""

import json
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("lightning", "timm", "torchao")


def link_cell(settings, notebook):
    """The link that opens the notebook of the repository that settings.ini names.

    It is text: a badge would be a picture from another host on each page."""
    place = f"{settings['user']}/{settings['repo']}/blob/{settings['branch']}/{notebook.relative_to(ROOT).as_posix()}"
    return [f"[Open in Colab](https://colab.research.google.com/github/{place})"]


def install_cell(settings, notebook, text):
    "Code that gets the repository and installs it with the extras that the page needs, on Colab only."
    extras = "experiments"
    if any(f"import {name}" in text or f"from {name}" in text for name in FRAMEWORKS):
        extras += ",frameworks"
    folder = notebook.parent.relative_to(ROOT)
    root = "/".join([".."] * len(folder.parts))
    return [
        "#| hide\n",
        "import sys\n",
        "\n",
        'if "google.colab" in sys.modules:\n',
        "    # the repository with its run files, and everything that the page needs\n",
        f"    !git clone -q --depth 1 {settings['git_url']}\n",
        f"    %cd -q {settings['repo']}/{folder.as_posix()}\n",
        f"    %pip install -q '{root}[{extras}]'",
    ]


def update(notebook, settings):
    "Write both cells into one tutorial."
    text = notebook.read_text(encoding="utf-8")
    book = json.loads(text)
    sources = link_cell(settings, notebook), install_cell(settings, notebook, text)
    for cell, kind, source in zip(book["cells"][1:3], ("markdown", "code"), sources, strict=True):
        old = "".join(cell["source"])
        if cell["cell_type"] != kind or not ("colab.research" in old or "google.colab" in old):
            name = notebook.relative_to(ROOT)
            raise SystemExit(
                f"{name}: after the title come a cell for the link to Colab and one for the installation there"
            )
        cell["source"] = source
    new = json.dumps(book, ensure_ascii=False, indent=1, sort_keys=False) + "\n"
    if new != text:
        notebook.write_text(new, encoding="utf-8")
        print(f"{notebook.relative_to(ROOT)} written")


def main():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    for notebook in sorted((ROOT / "nbs/tutorials").rglob("*.ipynb")):
        if not any(part.startswith(".") for part in notebook.relative_to(ROOT).parts):
            update(notebook, config["DEFAULT"])


if __name__ == "__main__":
    main()
