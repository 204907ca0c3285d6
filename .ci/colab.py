"""Write Colab's badge and installation into the tutorials: their second and third cell, made of settings.ini."""
import json
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cells(settings, path, text):
    "The sources of the two cells, with the repository that settings.ini names, and the extras that the page needs."
    extras = "experiments" + ",frameworks" * any(f"import {name}" in text or f"from {name}" in text for name in ("lightning", "timm", "torchao"))
    place = f"{settings['user']}/{settings['repo']}/blob/{settings['branch']}/{path.relative_to(ROOT).as_posix()}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{place})"
    install = ["#| hide\n", "import sys\n", "if 'google.colab' in sys.modules: # the repository with its run files, and everything that the page needs\n",
               f"    !git clone -q --depth 1 {settings['git_url']}\n", f"    %cd -q {settings['repo']}/nbs/tutorials\n", f"    %pip install -q '../..[{extras}]'"]  # fmt: skip
    return [badge], install


def main():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    for path in sorted((ROOT / "nbs/tutorials").glob("[0-9]*.ipynb")):
        text = path.read_text(encoding="utf-8")
        book = json.loads(text)
        for cell, kind, source in zip(book["cells"][1:3], ("markdown", "code"), cells(config["DEFAULT"], path, text)):
            if cell["cell_type"] != kind or not any(sign in "".join(cell["source"]) for sign in ("colab.research", "google.colab")):
                raise SystemExit(f"{path.relative_to(ROOT)}: the title has to be followed by a cell for Colab's badge and one for the installation there")
            cell["source"] = source
        new = json.dumps(book, ensure_ascii=False, indent=1, sort_keys=False) + "\n"
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
