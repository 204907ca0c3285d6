"Facts about the repository as a whole: what is generated agrees with its source, and every page has its own place."

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from pages import EXPORTED, NBS, ROOT, cells, code_cells, notebooks, page_name

import sgd_sai

PACKAGE = ROOT / "sgd_sai"
MAX_CELL_LINES, MAX_MODULE_LINES, MAX_NOQA = 40, 400, 10


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
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return sorted(p for p in map(ROOT.joinpath, set(listed.stdout.split("\0")) - {""}) if p.is_file())


# --- what is generated ----------------------------------------------------------------------------------------------


def test_readme_is_what_index_produces(tmp_path):
    code = "import sys; sys.path.insert(0, '.ci'); import readme; print(readme.readme(), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "README.md").read_text(encoding="utf-8"), "`make export` writes README.md"


def test_readme_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", readme, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(<?([^)\s>#]+)", text) + re.findall(r'\b(?:src|href)="([^"#]+)"', text)
    relative = [t for t in targets if not re.match(r"[a-z]+:", t)]
    assert [t for t in relative if not (ROOT / t).exists()] == []


def test_every_module_is_exported_from_a_notebook():
    directives = (re.search(r"#\|\s*default_exp\s+(\S+)", source) for _, source in code_cells())
    exported = {directive[1] for directive in directives if directive}
    modules = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    made_by_nbdev = {m for m in modules if m.endswith(".__init__")} | {"_modidx"}
    assert modules - made_by_nbdev == exported


# --- pages ----------------------------------------------------------------------------------------------------------


def sidebar_pages(entries):
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            if "href" in entry:
                yield entry["href"]
            yield from sidebar_pages(entry.get("contents", []))


def test_sidebars_and_notebooks_agree():
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    listed = [page for sidebar in website["sidebar"] for page in sidebar_pages(sidebar["contents"])]
    present = [f"{page_name(path)}.ipynb" for path in notebooks()]
    assert sorted(listed) == sorted([*present, "changelog.md"]), "sidebars in _quarto.yml (left), notebooks (right)"


def test_every_page_has_an_address_of_its_own():
    """nbdev drops a leading number from the name of a page, and two pages of one address end Quarto's build. A page
    whose name it changes is missing from Quarto's llms.txt, so that no page may begin with a number."""
    from nbdev.doclinks import _nbpath2html

    addresses = {path: _nbpath2html(path).relative_to(NBS).as_posix() for path in notebooks()}
    assert len(set(addresses.values())) == len(addresses)
    changed = [address for path, address in addresses.items() if address != f"{page_name(path)}.html"]
    assert changed == []


def test_old_addresses_lead_to_pages_of_today():
    moved = yaml.safe_load((ROOT / ".ci" / "redirects.yml").read_text(encoding="utf-8"))
    assert len(moved) > 60 and set(moved.values()) <= set(map(page_name, notebooks()))


def prints(source):
    "True if a cell prints when it runs: outside of the functions and classes that it defines."
    try:
        waiting = [*ast.parse(source).body]
    except SyntaxError:  # a magic
        return False
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            return not any(keyword.arg == "file" for keyword in node.keywords)
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return False


def shown_cells():
    "Name of the page, cell and source of the code cells that a reader sees with their outputs."
    for path in notebooks():
        for cell, source in cells(path, "code"):
            if not re.search(r"^#\|\s*(hide|export\w*|eval: false|gpu)\b", source, re.MULTILINE):
                yield page_name(path), cell, source


def test_pages_show_what_their_cells_printed():
    silent = [(page, source[:60]) for page, cell, source in shown_cells() if prints(source) and not cell["outputs"]]
    assert silent == []


def test_pages_show_no_warnings():
    noisy = []
    for page, cell, _ in shown_cells():
        printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        warnings = [line[:100] for line in printed.splitlines() if re.search(r"\b\w*Warning: |^W\d{4} ", line)]
        noisy += [(page, line) for line in warnings]
    assert noisy == []


# --- size -----------------------------------------------------------------------------------------------------------


def test_exported_cells_fit_a_screen():
    long = [(page, source.count("\n") + 1) for page, source in code_cells() if EXPORTED.match(source)]
    assert [(page, lines) for page, lines in long if lines > MAX_CELL_LINES] == []


def test_modules_are_short():
    lines = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8").count("\n") for p in PACKAGE.rglob("*.py")}
    index = lines.pop("sgd_sai/_modidx.py")  # nbdev's list of names
    assert index and {name: n for name, n in lines.items() if n > MAX_MODULE_LINES} == {}


def test_few_lines_are_exempt_from_ruff(files):
    sources = [p for p in files if p.suffix in (".py", ".ipynb") and PACKAGE not in p.parents]
    exempt = [p.name for p in sources for _ in re.findall(r"#\s*noqa\b", p.read_text(encoding="utf-8"))]
    here = exempt.count(Path(__file__).name)  # the pattern above
    assert len(exempt) - here <= MAX_NOQA


def test_no_large_files(files):
    large = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in files if p.stat().st_size > 2 * 1024**2}
    assert large == {}


# --- settings -------------------------------------------------------------------------------------------------------


def test_site_is_configured_in_one_place():
    own = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    assert own == {"project": {"type": "website"}, "metadata-files": ["../_quarto.yml", "nbdev.yml"]}


def test_owner_stands_in_settings_alone(settings, files):
    owner = settings["user"]
    assert owner not in settings["repo"]  # or every mention of the project would count
    made_from_settings = {"settings.ini", "README.md", "sgd_sai/_modidx.py"}
    named = {p.relative_to(ROOT).as_posix() for p in files if owner.encode() in p.read_bytes()}
    tutorials = {
        name for name in named if name.startswith("nbs/tutorials/")
    }  # .ci/colab.py writes their links to Colab
    assert "settings.ini" in named and named - tutorials <= made_from_settings


def test_versions_agree(settings):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert sgd_sai.__version__ == settings["version"] == str(citation["version"]) == version(settings["lib_name"])
    assert f"## [{settings['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_core_needs_torch_alone(settings):
    core = [r.name for r in map(Requirement, requires(settings["lib_name"])) if "extra" not in str(r.marker)]
    assert core == ["torch"]


EXTRAS = """accelerate fastcore IPython ipykernel matplotlib nbdev pandas pytorch_optimizer rich scipy seaborn sklearn
torchvision transformers typer yaml""".split()
IMPORT_WITHOUT_EXTRAS = """
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


def test_import_needs_torch_alone():
    code = IMPORT_WITHOUT_EXTRAS.format(names=set(EXTRAS), public=["SGDSaI", "SGD_sai", "gsnr", "gsnr_table"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LAYERS = (
    "internals",
    "",
    "experiments",
    "benchmarks",
    "analysis",
    "explore",
    "cli",
)  # a folder may import those before it


def imported_layers(path):
    "The layers that a module imports, inside of functions too; relative imports as nbdev writes them."
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*base, *(node.module or "").split(".")]
            if parts[0] == "sgd_sai":
                yield parts[1] if len(parts) > 1 and parts[1] in LAYERS else ""


def test_imports_go_one_way():
    backwards = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        own = parts[0] if len(parts) > 1 else ""
        if path.name != "__main__.py":  # the command line
            later = LAYERS[LAYERS.index(own) + 1 :]
            backwards += [(path.name, layer) for layer in imported_layers(path) if layer in later]
    assert backwards == []


def test_extras_are_complete(settings):
    needed = list(map(Requirement, requires(settings["lib_name"])))

    def extra(name):
        return {r.name for r in needed if f'extra == "{name}"' in str(r.marker)}

    assert extra("experiments") and extra("docs")
    assert extra("dev") > extra("experiments") | extra("docs")
