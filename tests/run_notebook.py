"""Run one notebook as a test: `python run_notebook.py PATH [--gpu]`. Exit code 1, with the traceback, when a cell fails.

Cells flagged `#| gpu` are left out unless --gpu is given, those with `#| eval: false` always.
"""
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.test import test_nb

# a notebook may start processes that import this file again
if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    force = ["gpu"] if "--gpu" in sys.argv[2:] else []
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), force_flags=force, basepath=get_config().config_path)
    sys.exit(0 if passed else 1)
