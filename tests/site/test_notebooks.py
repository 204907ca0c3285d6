"""Every notebook under nbs/ is one test: it runs from top to bottom, in its own process and in its own folder, as in
Jupyter, and prints what is saved in it."""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import cells, notebooks, page_name

RUNNER = Path(__file__).parent / "run_notebook.py"
TIMEOUT = 30 * 60  # seconds; a notebook that needs longer hangs
ENVIRONMENT = {**os.environ, "MPLBACKEND": "agg"}


def has_gpu_cells(path):
    return any(re.search(r"^#\s*\|\s*gpu\b", source, re.MULTILINE) for _, source in cells(path, "code"))


def as_param(path):
    marks = [pytest.mark.notebook] + [pytest.mark.gpu] * has_gpu_cells(path)
    return pytest.param(path, id=page_name(path), marks=marks)


def run_alone(path, out, gpu):
    "Exit code of a notebook in a process that starts from nothing; None when it takes too long."
    with open(out, "w") as file:
        command = [sys.executable, str(RUNNER), str(path), *["--gpu"] * gpu]
        try:
            return subprocess.run(
                command, cwd=path.parent, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, timeout=TIMEOUT
            ).returncode
        except subprocess.TimeoutExpired:
            return None


@functools.cache
def server():
    "The process that notebooks are forked from; one for each worker of pytest."
    command = [sys.executable, str(RUNNER), "--serve", str(TIMEOUT)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)  # which ends its input, and so the process
    assert process.stdout.readline() == "ready\n"
    return process


def run_forked(path, out):
    "The same without its GPU cells, in a process that has imported common libraries already."
    process = server()
    print(json.dumps([str(path), str(out)]), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline().replace("None", "null"))


@pytest.mark.parametrize("path", [as_param(path) for path in notebooks()])
def test_notebook(path, tmp_path):
    import torch

    out, gpu = tmp_path / "printed", torch.cuda.is_available()  # a GPU that has been looked at does not survive a fork
    code = run_forked(path, out) if sys.platform == "linux" and not gpu else run_alone(path, out, gpu)
    if code is None:
        pytest.fail(f"still running after {TIMEOUT} seconds", pytrace=False)
    if code:
        pytest.fail(f"exit code {code}\n{out.read_text().strip()}", pytrace=False)
