"""Run one notebook as a test: `python run_notebook.py PATH [--gpu]`. Exit code 1, with the traceback, when a cell fails.

Cells flagged `#| gpu` are left out unless --gpu is given, those with `#| eval: false` always.

`python run_notebook.py --serve SECONDS` runs many: it imports the libraries that most notebooks want, none of ours, and then reads lines of JSON, [PATH, file for what is printed].
Each notebook runs in a fork of this process, in which those imports have been made already, and the answer is a line with its exit code, or "None" after SECONDS.
"""
import importlib
import json
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from nbdev.config import get_config
from nbdev.test import test_nb

COMMON = ("torch._dynamo", "torch.distributed.fsdp", "torchvision", "matplotlib.pyplot", "pandas", "sklearn.datasets", "transformers.models.vit.modeling_vit", "transformers.models.gpt2.modeling_gpt2", "accelerate", "IPython")


def run(path, force=()):
    "Whether the notebook runs from top to bottom."
    path = Path(path).resolve()
    passed, _ = test_nb(path, skip_flags=get_config(path.parent).tst_flags.split(), force_flags=list(force), basepath=get_config(path.parent).config_path)
    return passed


def serve(seconds):
    "Fork for each line; returns, in a fork, what its exit code is to be."
    for name in COMMON:
        with suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        path, out = json.loads(line)
        pid = os.fork()
        if not pid:
            signal.alarm(seconds)  # which ends the process
            os.chdir(Path(path).parent)
            for number, fd in ((0, os.open(os.devnull, os.O_RDONLY)), (1, file := os.open(out, os.O_WRONLY | os.O_CREAT)), (2, file)):
                os.dup2(fd, number)
            return 0 if run(path) else 1
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(None if code == -signal.SIGALRM else code, flush=True)
    return 0


# a notebook may start processes that import this file again
if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.exit(serve(int(sys.argv[2])))
    sys.exit(0 if run(sys.argv[1], ["gpu"] if "--gpu" in sys.argv[2:] else []) else 1)
