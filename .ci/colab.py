"""Write Colab's badge and installation into the tutorials: their second and third cell, made of settings.ini."""

import json
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("lightning", "timm", "torchao")


def badge_cell(settings, notebook):
    "The badge, a link that opens the notebook of the repository that settings.ini names."
    place = f"{settings['user']}/{settings['repo']}/blob/{settings['branch']}/{notebook.relative_to(ROOT).as_posix()}"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return [f"[![Open in Colab]({image})](https://colab.research.google.com/github/{place})"]


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
    sources = badge_cell(settings, notebook), install_cell(settings, notebook, text)
    for cell, kind, source in zip(book["cells"][1:3], ("markdown", "code"), sources, strict=True):
        old = "".join(cell["source"])
        if cell["cell_type"] != kind or not ("colab.research" in old or "google.colab" in old):
            name = notebook.relative_to(ROOT)
            raise SystemExit(
                f"{name}: after the title come a cell for Colab's badge and one for the installation there"
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
