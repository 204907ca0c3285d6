"""Fail when exporting or cleaning the notebooks, or writing README.md, would change a file of the repository.

All of it happens in a copy, with sgd_sai/ emptied first: what no notebook produces is found too, and the working tree stays as it is.
"""
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIB = "sgd_sai"


def repository_files(root):
    "Paths of all files that git tracks or would track."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, check=True, capture_output=True)
    return sorted(p for p in {os.fsdecode(p) for p in listed.stdout.split(b"\0") if p} if (root / p).is_file())


def run(*command, cwd):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev exports nothing when this is set
    subprocess.run([sys.executable, *command], cwd=cwd, env=env, check=True)


def main():
    files = repository_files(ROOT)
    with tempfile.TemporaryDirectory(prefix="check") as tmp:
        copy = Path(tmp, "repository")
        for path in files:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            if not path.startswith(LIB + "/") or not path.endswith(".py"):
                shutil.copy2(ROOT / path, copy / path)
        (copy / LIB).mkdir(exist_ok=True)
        try:
            run("-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()", cwd=copy)
            run("-c", "from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()", cwd=copy)
            run(".ci/readme.py", cwd=copy)
            run(".ci/colab.py", cwd=copy)
        except subprocess.CalledProcessError:
            raise SystemExit("The notebooks could not be exported; the message stands above.") from None

        ignored = {"nbs/.last_checked"}
        made = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts} - ignored
        changed = [p for p in sorted(made | set(files)) if not same(ROOT / p, copy / p)]
        for path in changed:
            show(path, ROOT / path, copy / path)
    if changed:
        print("\nThe notebooks and the files made from them differ:", *changed, sep="\n  ", file=sys.stderr)
        raise SystemExit("Run `make export`, look at the changes, and commit them. (A file of sgd_sai/ that no notebook makes has to go.)")
    print("Exported modules, notebooks and README.md are up to date.")


def same(a, b):
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)


def show(path, old, new):
    "The difference, cut to a length that can be read."
    old, new = (p if p.is_file() else Path(os.devnull) for p in (old, new))
    diff = subprocess.run(["git", "diff", "--no-index", "--no-color", "--", str(old), str(new)], capture_output=True, text=True).stdout.splitlines()
    body = [line for line in diff if not line.startswith(("diff --git", "index ", "--- ", "+++ ", "new file", "deleted file"))]
    print(f"--- {path}", *(line[:200] for line in body[:60]), sep="\n")
    if len(body) > 60:
        print(f"... {len(body) - 60} more lines")


if __name__ == "__main__":
    main()
