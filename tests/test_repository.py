"Facts about the repository as a whole: what is generated agrees with what it is generated from, and every notebook can be found on the site."
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import sgd_sai

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


@pytest.fixture(scope="module")
def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


@pytest.fixture(scope="module")
def files():
    "Paths of the files that git tracks or would track."
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return sorted(p for p in map(ROOT.joinpath, set(listed.stdout.split("\0")) - {""}) if p.is_file())


def sidebar_pages(entries):
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            if "href" in entry:
                yield entry["href"]
            yield from sidebar_pages(entry.get("contents", []))


def test_readme_is_what_index_produces():
    done = subprocess.run([sys.executable, ".ci/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_links_lead_somewhere():
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(<?([^)\s>#]+)", text) + re.findall(r'\b(?:src|href)="([^"#]+)"', text)
    relative = [t for t in targets if not re.match(r"[a-z]+:", t)]
    assert [t for t in relative if not (ROOT / t).exists()] == []


def test_sidebar_and_notebooks_agree():
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    listed = list(sidebar_pages(website["sidebar"]["contents"]))
    found = [p.relative_to(NBS) for p in NBS.rglob("*.ipynb")]
    found = [p.as_posix() for p in found if not any(part.startswith(("_", ".")) for part in p.parts)]
    assert sorted(listed) == sorted([*found, "changelog.md"]), "sidebar in _quarto.yml (left) and notebooks under nbs/ (right)"


def prints(source):
    "Whether a cell prints when it runs: outside of the functions and classes that it defines."
    try:
        waiting = [*ast.parse(source).body]
    except SyntaxError:  # a magic
        return False
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and not any(keyword.arg == "file" for keyword in node.keywords):
            return True
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return False


def test_pages_show_what_their_cells_printed_and_no_warnings():
    silent, noisy = [], []
    for path in NBS.rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts) else ():
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or re.search(r"^#\|\s*(hide|export\w*|eval: false|gpu)\b", source, re.MULTILINE):
                continue
            printed = "".join("".join(out.get("text", "")) for out in cell["outputs"])
            silent += [(path.name, source[:60])] if prints(source) and not cell["outputs"] else []
            noisy += [(path.name, line[:100]) for line in printed.splitlines() if re.search(r"\b\w*Warning: |^W\d{4} ", line)]
    assert not silent and not noisy, (silent, noisy)


def test_site_is_configured_in_one_place():
    own = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    assert own == {"project": {"type": "website"}, "metadata-files": ["../_quarto.yml", "nbdev.yml"]}


def test_owner_stands_in_settings_alone(settings, files):
    owner = settings["user"]
    assert owner not in settings["repo"]  # or every mention of the project would count
    made_from_settings = {"settings.ini", "README.md", "sgd_sai/_modidx.py"}
    found = {p.relative_to(ROOT).as_posix() for p in files if owner.encode() in p.read_bytes()}
    tutorials = {name for name in found if name.startswith("nbs/tutorials/")}  # whose badges are made from settings.ini, see .ci/colab.py
    assert "settings.ini" in found and found - tutorials <= made_from_settings


def test_versions_agree(settings):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert sgd_sai.__version__ == settings["version"] == str(citation["version"]) == version(settings["lib_name"])
    assert f"## [{settings['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_core_needs_torch_alone(settings):
    core = [r.name for r in map(Requirement, requires(settings["lib_name"])) if "extra" not in str(r.marker)]
    assert core == ["torch"]


def test_import_needs_torch_alone():
    code = """
import sys

class Absent:
    names = {names!r}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import sgd_sai
missing = [n for n in {public!r} if not hasattr(sgd_sai, n)]
assert not missing, missing
"""
    extras = ["accelerate", "fastcore", "IPython", "ipykernel", "matplotlib", "nbdev", "pandas", "pytorch_optimizer", "rich", "seaborn"]
    extras += ["sklearn", "torchvision", "transformers", "typer", "yaml"]
    code = code.format(names=set(extras), public=["SGDSaI", "SGD_sai", "gsnr", "gsnr_table"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_extras_are_complete(settings):
    needed = list(map(Requirement, requires(settings["lib_name"])))

    def extra(name):
        return {r.name for r in needed if f'extra == "{name}"' in str(r.marker)}

    assert extra("experiments") and extra("docs")
    assert extra("dev") > extra("experiments") | extra("docs")


def test_no_large_files(files):
    large = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in files if p.stat().st_size > 2 * 1024**2}
    assert large == {}
