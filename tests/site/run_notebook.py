"""Run one notebook as a test: `python run_notebook.py PATH [--gpu]`. Exit code 1, with the traceback, when a cell
fails, and with the differences when a cell prints something else than what is saved with it (see `saved_outputs.py`).

Cells flagged `#| gpu` are left out unless --gpu is given, those with `#| eval: false` always.

`python run_notebook.py --serve SECONDS` runs many: it imports the libraries that most notebooks want, none of ours, and
then reads lines of JSON, [PATH, file for what is printed]. Each notebook runs in a fork of this process, in which those
imports have been made already, and the answer is a line with its exit code, or "None" after SECONDS.
"""

import importlib
import json
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.process import NBProcessor
from saved_outputs import differences

COMMON_IMPORTS = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torchvision",
    "matplotlib.pyplot",
    "pandas",
    "sklearn.datasets",
    "transformers.models.vit.modeling_vit",
    "transformers.models.gpt2.modeling_gpt2",
    "accelerate",
    "IPython",
)


def is_skipped(cell, skip_flags):
    "True for a cell that is not run: prose, `#| eval: false`, or flagged with one of `skip_flags`."
    if cell.cell_type != "code":
        return True
    directives = getattr(cell, "directives_", None) or {}
    return directives.get("eval:", [""])[0].lower() == "false" or bool(set(skip_flags) & directives.keys())


def run(path, run_gpu_cells=False):
    "True if the notebook runs from top to bottom and prints what is saved in it. Prints what is wrong otherwise."
    path = Path(path).resolve()
    config = get_config(path.parent)
    skip_flags = [flag for flag in config.tst_flags.split() if not (flag == "gpu" and run_gpu_cells)]
    sys.path.insert(0, str(config.config_path))
    os.environ["IN_TEST"] = "1"  # nbdev_export() in a cell does nothing
    notebook = NBProcessor(path, process=True).nb
    saved = {cell.id: json.loads(json.dumps(cell.get("outputs", []))) for cell in notebook.cells}
    printed = {}

    def keep_outputs(cell):
        printed[cell.id] = cell.outputs if shell.exc is None else []

    def prepare(cell):
        if is_skipped(cell, skip_flags):
            return True
        cell.outputs = []
        return False

    shell = CaptureShell(path)
    os.chdir(path.parent)
    try:
        shell.run_all(notebook, exc_stop=True, preproc=prepare, postproc=keep_outputs)
    except Exception:
        print(shell.prettytb(fname=path), file=sys.stderr)
        return False
    problems = []
    for number, cell in enumerate(notebook.cells):
        if cell.id in printed:
            problems += [f"cell {number}: {text}" for text in differences(cell, saved[cell.id], printed[cell.id])]
    if problems:
        print(*problems, "", f"`make outputs ARGS={path.name}` saves what the notebook prints now.", sep="\n")
    return not problems


def run_in_child(path, out, seconds):
    "In a fork: run one notebook, what it prints goes to the file `out`. A signal ends it after `seconds`."
    signal.alarm(seconds)
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(out, os.O_WRONLY | os.O_CREAT)
    for number, descriptor in ((0, nothing), (1, file), (2, file)):
        os.dup2(descriptor, number)
    return 0 if run(path) else 1


def serve(seconds):
    "Fork for each line of the input; returns, in a fork, what its exit code is to be."
    for name in COMMON_IMPORTS:
        with suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        path, out = json.loads(line)
        pid = os.fork()
        if not pid:
            return run_in_child(path, out, seconds)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(None if code == -signal.SIGALRM else code, flush=True)
    return 0


# a notebook may start processes that import this file again
if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.exit(serve(int(sys.argv[2])))
    sys.exit(0 if run(sys.argv[1], "--gpu" in sys.argv[2:]) else 1)
