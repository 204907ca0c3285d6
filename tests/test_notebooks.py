"Every notebook under nbs/ is one test: it runs from top to bottom, in its own process and in its own folder, as in Jupyter."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
TIMEOUT = 30 * 60  # seconds; a notebook that needs longer hangs


def notebooks():
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith(("_", ".")) for part in p.relative_to(NBS).parts))


def has_gpu_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return any(c["cell_type"] == "code" and re.search(r"^#\s*\|\s*gpu\b", "".join(c["source"]), re.MULTILINE) for c in cells)


def as_param(path):
    marks = [pytest.mark.notebook] + [pytest.mark.gpu] * has_gpu_cells(path)
    return pytest.param(path, id=path.relative_to(NBS).with_suffix("").as_posix(), marks=marks)


@pytest.fixture(scope="session")
def gpu_flag():
    import torch

    return ["--gpu"] if torch.cuda.is_available() else []


@pytest.mark.parametrize("path", [as_param(path) for path in notebooks()])
def test_notebook(path, gpu_flag):
    env = {**os.environ, "MPLBACKEND": "agg"}
    command = [sys.executable, str(ROOT / "tests" / "run_notebook.py"), str(path), *gpu_flag]
    try:
        done = subprocess.run(command, cwd=path.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {TIMEOUT} seconds", pytrace=False)
    if done.returncode:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout.strip()}", pytrace=False)
