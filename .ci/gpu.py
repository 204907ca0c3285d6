"""Everything that wants a GPU, in one command: `make gpu`, or `python3 .ci/gpu.py [--out DIR]` under any interpreter
that has torch, without installation and without network, from a checkout.

Each part runs in a process of its own and has a limit, and all together end within --minutes. What a part has measured
stands in DIR/CARD/PART.json, written after each of its units, so that a run that was cut off leaves what it had. The
next run with the same DIR goes on from there. What is not here, such as a package, is named and left out.

`--device cpu --quick` is the rehearsal: every part runs on the CPU at a tiny size. Exit code 0 when every part that ran
has passed, 1 otherwise, 2 when nothing can be measured here."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gpu_tests import RECORD, read_record, write_whole

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).resolve()
PACKAGES = """accelerate diffusers expecttest filelock hypothesis IPython matplotlib numpy pandas peft psutil pytest
pytorch_optimizer rich scipy seaborn sklearn torchvision transformers triton typer xdist yaml""".split()
FINE = ("passed", "partly", "missing", "left out")  # what lets the command end with 0
QUICK_TESTS = ("tests/core/test_options.py",)
SWEEPS = ("shakespeare-gpt-large", "python-gpt2")
LOG_LINES = 20
ON_A_CPU = 4  # times as long a part may take in the rehearsal, whose processor may be busy with other things
PATIENCE = 5  # seconds that a process has to end by itself


class Part(NamedTuple):
    "A part of the run."

    what: str
    limit: float  # seconds after which its process is ended
    least: float  # seconds that have to be left for it to begin


PARTS = {  # in the order of their worth; training takes whatever the others leave
    "tests": Part("tests that have something to do on the device", 150, 30),
    "steps": Part("step time, and the floor of memory", 110, 25),
    "first": Part("the first step, and the waits in it", 45, 15),
    "memory": Part("state by rule and as kept, temporaries", 75, 20),
    "graphs": Part("captured steps", 60, 20),
    "compile": Part("compiled steps", 90, 30),
    "notebooks": Part("cells of notebooks for a GPU", 75, 20),
    "training": Part("two sweeps", 10**6, 60),
}


def arguments(given=None):
    "The options of the command."
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="folder for records")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether everything runs")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help="names with commas, in this order")
    parser.add_argument("--changed", action="store_true", help="repeat what has passed with other code, too")
    parser.add_argument("--data", type=Path, help="folder with data for training")
    parser.add_argument("--tests", nargs="+", help="what pytest is given instead of all tests for a GPU")
    parser.add_argument("--sweeps", nargs="+", help="files that are trained instead of sweeps/*/gpu.yaml")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.parts = [name.strip() for name in options.parts.split(",") if name.strip()]
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown or not options.parts:
        parser.error(f"--parts: {', '.join(unknown) or 'none given'}; known: {', '.join(PARTS)}")
    return options


def is_installed(name):
    "True if a package can be imported, without importing it."
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


# --- processes ------------------------------------------------------------------------------------------------------


def child_environment(**more):
    "Environment variables of every process: the checkout is found without installation."
    paths = [str(ROOT), str(SCRIPT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "agg", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, **more}


def end_group(process):
    "End a process and all that it started: first politely."
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(PATIENCE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def run_limited(command, log, seconds, **variables):
    "Exit code of a process with its output in a file; None when it took too long. It takes what it started with it."
    with open(log, "w", encoding="utf-8") as file:
        options = dict(stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        process = subprocess.Popen(command, cwd=ROOT, env=child_environment(**variables), **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def last_lines(log, count=LOG_LINES):
    "The end of an output."
    return log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-count:] if log.exists() else []


# --- parts ----------------------------------------------------------------------------------------------------------


def test_command(options):
    "pytest on everything that wants a GPU; notebooks have a part of their own."
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_tests", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]
    chosen = options.tests or (QUICK_TESTS if options.device == "cpu" else None)
    if chosen:
        return [*command, *chosen]
    command += ["--gpu", "-m", "not notebook", "--ignore", "tests/site"]
    if is_installed("xdist"):
        command += ["--numprocesses", "4", "--dist", "worksteal"]
    if is_installed("pytest_timeout"):
        command += ["--timeout", "60"]  # a test that hangs has a name then
    return [*command, "tests"]


def part_command(name, options, record, seconds):
    "The command of a part."
    if name == "tests":
        return test_command(options)
    command = [sys.executable, str(SCRIPT), "--worker", name, "--record", str(record), "--device", options.device]
    command += ["--seconds", f"{seconds:.1f}"] + ["--quick"] * options.quick
    command += ["--data", str(options.data.resolve())] if options.data else []
    return command + (["--sweeps", *options.sweeps] if options.sweeps else [])


def begin_record(path, name, options, environment):
    "Write the record of a part that begins; units that passed with the same code are kept. True if there were any."
    old = read_record(path)
    same = old.get("environment", {}).get("code") == environment["code"]
    kept = {key: old[key] for key in ("units", "outcomes", "failures", "missing") if same and key in old}
    head = {"part": name, "status": "unfinished", "device": options.device, "quick": options.quick}
    write_whole(path, {**head, "environment": environment, **kept})
    return bool(kept)


def finish_record(path, code, seconds, limit, log):
    "Complete the record of a part whose process has ended."
    record = read_record(path)
    if code is None:
        record |= {"status": "timed out", "limit": round(limit, 1)}
    elif record["status"] == "unfinished":
        lacks = missing_package(log)
        record |= {"status": "missing", "lacks": lacks} if lacks else {"status": "crashed", "exit_code": code}
    record["seconds"] = round(seconds, 1)
    if record["status"] not in ("passed", "partly"):
        record["output"] = last_lines(log)
    write_whole(path, record)
    return record


def missing_package(log):
    "The package for want of which a process could not begin."
    last = (last_lines(log, 1) or [""])[0]
    return last.rpartition("No module named ")[2].strip("'\"") if "No module named" in last else None


def details(record):
    "What came of the units of a part, or of its tests, in one line."
    texts = [", ".join(f"{n} {outcome}" for outcome, n in record.get("counts", {}).items())]
    texts += [f"{module} is missing" for module in record.get("missing", {})] + list(record.get("failures", {}))
    for name, unit in record.get("units", {}).items():
        texts.append(f"{name}: {unit['status']}" + (f" ({unit['error']})" if "error" in unit else ""))
    running = record.get("running") or []
    if record["status"] in ("timed out", "crashed") and running:
        texts.append(f"was running: {running if isinstance(running, str) else ', '.join(running)}")
    return "; ".join(" ".join(text.split()) for text in texts if text)


def run_part(name, options, folder, environment, left):
    "Run one part; its status, seconds and details."
    path, log = folder / f"{name}.json", folder / f"{name}.log"
    old = read_record(path)
    other = old.get("environment", {}).get("code") != environment["code"]
    if old.get("status") == "passed" and not (other and options.changed):
        return "passed", None, "was there already" + (", from other code" if other else "")
    part = PARTS[name]
    if left < part.least:
        return "left out", None, f"{max(left, 0):.0f} s are left, and it wants {part.least:.0f}"
    most = part.limit * (ON_A_CPU if options.device == "cpu" else 1)
    limit, begin = min(most, left), time.monotonic()
    begin_record(path, name, options, environment)
    command = part_command(name, options, path, limit)
    code = run_limited(command, log, limit, **{RECORD: str(path)})
    record = finish_record(path, code, time.monotonic() - begin, limit, log)
    more = record.get("lacks") and f"{record['lacks']} is missing"
    return record["status"], record["seconds"], more or details(record)


# --- inside the process of a part -----------------------------------------------------------------------------------


def notebook_unit(path, seconds):
    "A function that runs one notebook in a process."

    def unit():
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            code = run_limited([sys.executable, str(SCRIPT.parent / "gpu_notebooks.py"), str(path)], log, seconds)
            lacks = missing_package(log)
            if lacks:
                raise ModuleNotFoundError(f"No module named {lacks!r}")
            if code != 0:
                why = f"still running after {seconds} seconds" if code is None else f"exit code {code}"
                return {"problem": why, "output": last_lines(log)}
        return {}

    return unit


def notebook_units(options):
    "The notebooks that have cells for a GPU; the rehearsal takes a short one."
    from gpu_notebooks import gpu_notebooks

    paths = gpu_notebooks(ROOT / "nbs")
    if options.quick:
        paths = [path for path in paths if path.stem == "cuda_allocator"]
    return {path.relative_to(ROOT).as_posix(): notebook_unit(path, 60) for path in paths}


def quick_sweep(folder):
    "The file of a sweep of a second."
    file = folder / "quick-sweep.yaml"
    file.write_text("task: digits-vit\noptimizers: [sgd_sai]\nseeds: 1\nsteps: 2\ncurve: false\n", encoding="utf-8")
    return file


def training_unit(file, options, end, after):
    "A function that trains as many runs of a sweep as fit; `after` more sweeps want a share of the time until `end`."

    def unit():
        from sgd_sai.benchmarks.device_records import NotAvailable
        from sgd_sai.experiments.sweep import read_sweep
        from sgd_sai.experiments.tasks.registry import get_task

        if not file.exists():
            raise NotAvailable(f"there is no {file.name} of {file.parent.name}")
        task, runs = get_task(read_sweep(file).task).name, options.record.parent / "runs"
        importlib.import_module("typer")
        command = [sys.executable, "-m", "sgd_sai", "sweep", str(file), "--out", str(runs), "--device", options.device]
        command += ["--data", str(options.data)] if options.data else []
        log = options.record.with_name(f"training-{task}.log")
        code = run_limited(command, log, max((end - time.monotonic()) / (after + 1), 1))
        made = len(list((runs / task).glob("*.json")))
        if code and not made and not any("Traceback" in line for line in last_lines(log, 200)):
            raise NotAvailable(" ".join(last_lines(log, 3)))
        problem = {"problem": " ".join(last_lines(log, 3))} if code else {}
        return {"task": task, "runs": made, "finished": code is not None, **problem}

    return unit


def training_units(options):
    "The sweeps that want a GPU."
    files = [Path(file) for file in options.sweeps or ()] or [ROOT / "sweeps" / task / "gpu.yaml" for task in SWEEPS]
    if options.quick and not options.sweeps:
        files = [quick_sweep(options.record.parent)]
    end = time.monotonic() + options.seconds - 10  # the last seconds are for packing up
    names = [file.parent.name if file.stem == "gpu" else file.stem for file in files]
    after = range(len(files) - 1, -1, -1)
    return {name: training_unit(file, options, end, n) for name, file, n in zip(names, files, after, strict=True)}


def work(options):
    "Run the units of a part in this process."
    from sgd_sai.benchmarks.device_records import run_units

    if options.worker == "notebooks":
        units = notebook_units(options)
    elif options.worker == "training":
        units = training_units(options)
    else:
        from sgd_sai.benchmarks.device_parts import DEVICE_PARTS

        units = DEVICE_PARTS[options.worker](options.device, options.quick)
    run_units(options.record, units, lambda name, outcome: print(f"{name}: {outcome['status']}", flush=True))


def look_around(options):
    "Write where this is to the record: the card, versions, and which packages are not installed."
    from sgd_sai.benchmarks.device_records import card_environment, card_folder
    from sgd_sai.experiments.choices import check_device

    check_device(options.device)
    environment = card_environment(options.device)
    lacking = [name for name in PACKAGES if not is_installed(name)]
    folder = card_folder(environment["card"]) + "-quick" * options.quick
    write_whole(options.record, {"folder": folder, "environment": environment | {"missing_packages": lacking}})


# --- the command ----------------------------------------------------------------------------------------------------


def surroundings(options):
    "Folder and environment as a process of its own finds them; ends the command when it finds nothing."
    with tempfile.TemporaryDirectory() as folder:
        record, log = Path(folder) / "around.json", Path(folder) / "log"
        command = [sys.executable, str(SCRIPT), "--worker", "around", "--record", str(record)]
        command += ["--device", options.device] + ["--quick"] * options.quick
        code = run_limited(command, log, 120)
        if code != 0:
            why = "torch does not answer" if code is None else (last_lines(log, 1) or ["no reason given"])[0]
            print(f"nothing can be measured here: {why}", file=sys.stderr)
            raise SystemExit(2)
        return read_record(record)


def show(rows):
    "Print the table at the end: with rich where it is installed."
    head = ("part", "status", "seconds", "details")
    texts = [(name, status, f"{seconds:.1f}" if seconds else "", text) for name, status, seconds, text in rows]
    if is_installed("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(*head, box=None, padding=(0, 2, 0, 0))
        for row in texts:
            table.add_row(*row)
        return Console(markup=False, highlight=False).print(table)
    for row in (head, *texts):
        print(f"{row[0]:10} {row[1]:10} {row[2]:>8}  {row[3]}")


def main(options):
    "Run the parts one after the other; the exit code."
    begin = time.monotonic()
    around = surroundings(options)
    environment, folder = around["environment"], options.out.resolve() / around["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    told = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "driver", "commit", "code"))
    print(f"{environment['card']}: {told}; {options.minutes:g} minutes; records in {folder}", flush=True)
    if environment["missing_packages"]:
        print(f"not installed: {', '.join(environment['missing_packages'])}", flush=True)
    rows = []
    for name in PARTS:
        if name in options.parts:
            left = 60 * options.minutes - (time.monotonic() - begin)
            rows.append((name, *run_part(name, options, folder, environment, left)))
            seconds = f"{rows[-1][2]:.1f} s" if rows[-1][2] else ""
            print(f"{name:10} {rows[-1][1]:10} {seconds:>8}  {rows[-1][3]}", flush=True)
    print(f"\n{time.monotonic() - begin:.0f} seconds in all", flush=True)
    show(rows)
    return 0 if all(status in FINE for _, status, _, _ in rows) else 1


def stop(number, frame):
    "A signal to end is an exit, which ends the processes of parts on its way."
    raise SystemExit(128 + number)


if __name__ == "__main__":
    chosen = arguments()
    signal.signal(signal.SIGTERM, stop)
    sys.path.insert(0, str(ROOT))
    if chosen.worker == "around":
        look_around(chosen)
    elif chosen.worker:
        work(chosen)
    else:
        sys.exit(main(chosen))
