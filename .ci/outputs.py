"""Run notebooks and save what they print: `python outputs.py [NAME ...]`, names of files below nbs/; default: all.

Cells flagged `#| eval: false` or `#| gpu` are not run and keep their outputs.
"""

import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parents[1] / "nbs"
NOT_RUN = re.compile(r"^#\s*\|\s*(eval:\s*false|gpu)\b", re.MULTILINE)


def rerun(path):
    "Run one notebook in its folder and save it."
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    left_out = [(cell, cell.source, cell.outputs) for cell in cells if NOT_RUN.search(cell.source)]
    for cell, _, _ in left_out:
        cell.source = ""
    options = {"timeout": 1800, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, **options).execute()
    for cell, source, outputs in left_out:
        cell.source, cell.outputs = source, outputs
    for cell in cells:
        cell.execution_count = None
        cell.outputs = [output for output in cell.outputs if "[IPKernelApp]" not in output.get("text", "")]
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = None
    notebook.metadata.pop("language_info", None)
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def main():
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the tests
    names = [Path(name).name for name in sys.argv[1:]]
    for path in sorted(NBS.rglob("*.ipynb")):
        hidden = any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)
        if not hidden and (not names or path.name in names):
            print(path.relative_to(NBS), flush=True)
            rerun(path)


if __name__ == "__main__":
    main()
