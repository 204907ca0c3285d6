"""`make gpu`, rehearsed on a CPU: every part, a run that is cut off and goes on, parts that fail, hang, crash or find
nothing, and packages that are missing."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "gpu.py"
REHEARSAL = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick"]


def script(name):
    "A script of .ci as a module."
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # gpu.py imports gpu_tests by this name
    spec.loader.exec_module(module)
    return module


script("gpu_tests")
gpu = script("gpu")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def rehearse(tmp_path, monkeypatch, capsys):
    "A function that runs parts in this process, each still in its own: exit code, records by part, what was printed."
    environment = {"card": "cpu", "code": "abc", "missing_packages": []}
    environment |= dict.fromkeys(("torch", "triton", "driver", "commit"))

    def run(*given, code="abc"):
        around = {"folder": "cpu-quick", "environment": environment | {"code": code}}
        monkeypatch.setattr(gpu, "surroundings", lambda options: around)
        options = gpu.arguments(["--device", "cpu", "--quick", "--out", str(tmp_path), *map(str, given)])
        exit_code = gpu.main(options)
        records = {path.stem: read(path) for path in (tmp_path / "cpu-quick").glob("*.json")}
        return exit_code, records, capsys.readouterr().out

    return run


def write_tests(folder, text):
    "A file of tests."
    file = folder / "test_small.py"
    file.write_text(text, encoding="utf-8")
    return file


def time_is_up_when(monkeypatch, marker):
    "Let processes take too long as soon as this file exists, however slow the machine is."

    class Watched(subprocess.Popen):
        waited = False

        def wait(self, timeout=None):
            while not self.waited and self.poll() is None:
                if marker.exists():
                    self.waited = True
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.02)
            return super().wait(timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Watched)


# --- the whole ------------------------------------------------------------------------------------------------------


def test_rehearsal_that_is_cut_off_goes_on_and_runs_every_part(tmp_path):
    command, folder = [*REHEARSAL, "--out", str(tmp_path), "--minutes", "30"], tmp_path / "cpu-quick"
    with open(tmp_path / "printed", "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path, start_new_session=True)
    end = time.monotonic() + 300
    while not (folder / "first.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM, (tmp_path / "printed").read_text()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing is left of it
    early = {part: read(folder / f"{part}.json") for part in ("tests", "steps")}
    assert {record["status"] for record in early.values()} == {"passed"}
    assert read(folder / "first.json")["status"] == "unfinished"

    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {part: read(folder / f"{part}.json") for part in gpu.PARTS}
    assert {part: record["status"] for part, record in records.items()} == dict.fromkeys(gpu.PARTS, "passed")
    assert all(records[part] == early[part] for part in early) and done.stdout.count("was there already") >= 2
    for record in records.values():
        assert {"card", "torch", "triton", "driver", "commit", "code", "date"} <= set(record["environment"])
        assert record["quick"] and record["device"] == "cpu"
    iterations = [u for name, u in records["compile"]["units"].items() if name.startswith("Newton-Schulz, ")]
    assert len(iterations) == 1 and iterations[0]["result"]["compile_seconds"] > 0
    assert len(list((folder / "runs" / "digits-vit").glob("*.json"))) == 1
    assert not list(folder.glob(".part-*"))


def test_command_without_a_gpu_says_so():
    "torch finds none where there is none, and none where it is shown none."
    command = [sys.executable, str(SCRIPT), "--parts", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "no CUDA device" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", [["--parts", "test"], ["--parts", ","], ["--device", "tpu"]])
def test_wrong_options_end_with_2(given, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.arguments(given)
    assert ended.value.code == 2 and "usage" in capsys.readouterr().err


# --- tests ----------------------------------------------------------------------------------------------------------

MIXED = """
import pytest

def test_good(): pass
def test_bad(): assert 1 + 1 == 3, "sums are wrong"
def test_lacks(): import no_such_package
@pytest.mark.skip
def test_left_out(): pass
@pytest.fixture
def broken(): raise ValueError("fixture")
def test_broken(broken): pass
"""


def test_failed_tests_are_named_with_the_end_of_their_tracebacks(rehearse, tmp_path):
    file = write_tests(tmp_path, MIXED)
    code, records, printed = rehearse("--parts", "tests", "--tests", file)
    record = records["tests"]
    assert code == 1 and record["status"] == "failed"
    assert record["counts"] == {"passed": 1, "failed": 2, "missing": 1, "skipped": 1}
    names = {name.rpartition("::")[2]: lines for name, lines in record["failures"].items()}
    assert set(names) == {"test_bad", "test_broken"} and any("sums are wrong" in line for line in names["test_bad"])
    assert list(record["missing"]) == ["no_such_package"] and "no_such_package is missing" in printed
    assert "test_bad" in printed

    file.write_text(MIXED.replace("== 3", "== 2").replace('raise ValueError("fixture")', "return 1"))
    code, records, printed = rehearse("--parts", "tests", "--tests", file)
    assert code == 0 and records["tests"]["status"] == "passed" and not records["tests"]["failures"]
    assert records["tests"]["counts"] == {"passed": 3, "missing": 1, "skipped": 1}


HANGS = """
import time, pathlib

def test_bad(): assert False, "known before the hang"
def test_good(): pathlib.Path(__file__).with_name("ran").open("a").write("x")
def test_hangs():
    pathlib.Path(__file__).with_name("hangs").touch()
    time.sleep(3600)
"""


def test_tests_that_hang_leave_their_failures_and_the_next_run_leaves_out_what_passed(rehearse, tmp_path, monkeypatch):
    file = write_tests(tmp_path, HANGS)
    with monkeypatch.context() as patched:
        time_is_up_when(patched, tmp_path / "hangs")
        code, records, printed = rehearse("--parts", "tests", "--tests", file)
    record = records["tests"]
    assert code == 1 and record["status"] == "timed out"
    assert [name.rpartition("::")[2] for name in record["failures"]] == ["test_bad"]
    assert [name.rpartition("::")[2] for name in record["running"]] == ["test_hangs"]
    assert "test_bad" in printed and "was running: " in printed
    file.write_text(HANGS.replace("time.sleep(3600)", "pass").replace("assert False", "assert True"))
    assert rehearse("--parts", "tests", "--tests", file)[0] == 0
    assert (tmp_path / "ran").read_text() == "x"


def test_a_test_file_that_lacks_a_package_is_missing_and_the_others_run(rehearse, tmp_path):
    (tmp_path / "test_lacks.py").write_text("import no_such_package\n")
    good = write_tests(tmp_path, "def test_good(): pass\n")
    code, records, _ = rehearse("--parts", "tests", "--tests", tmp_path / "test_lacks.py", good)
    assert code == 0 and records["tests"]["counts"] == {"missing": 1, "passed": 1}
    assert list(records["tests"]["missing"]) == ["no_such_package"]


# --- other parts ----------------------------------------------------------------------------------------------------


PASSES = 'r = json.load(open(record)); r["status"] = "passed"; json.dump(r, open(record, "w"))'


def stand_in(monkeypatch, text):
    "Let the process of the part `steps` run this program instead of its own; those of others pass."

    def command(name, options, record, seconds):
        program = text if name == "steps" else PASSES
        return [sys.executable, "-c", "import sys, json, os, time\nrecord = sys.argv[1]\n" + program, str(record)]

    monkeypatch.setattr(gpu, "part_command", command)


def test_a_part_that_crashes_keeps_its_units_and_says_what_was_running(rehearse, monkeypatch):
    text = """
r = json.load(open(record))
r |= {"units": {"a": {"status": "passed"}}, "running": "b"}
json.dump(r, open(record, "w"))
print("the last words", flush=True)
os.kill(os.getpid(), 11)
"""
    stand_in(monkeypatch, text)
    code, records, printed = rehearse("--parts", "steps,first")
    record = records["steps"]
    assert records["first"]["status"] == "passed"
    assert code == 1 and record["status"] == "crashed" and record["exit_code"] == -11
    assert record["units"] == {"a": {"status": "passed"}} and record["output"] == ["the last words"]
    assert "was running: b" in printed


def test_a_part_that_hangs_is_ended_with_what_it_started(rehearse, monkeypatch, tmp_path):
    child = tmp_path / "child"
    text = f"""
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
open({str(child)!r} + "~", "w").write(str(p.pid))
os.replace({str(child)!r} + "~", {str(child)!r})
time.sleep(3600)
"""
    stand_in(monkeypatch, text)
    time_is_up_when(monkeypatch, child)
    monkeypatch.setattr(gpu, "PATIENCE", 0.5)
    code, records, _ = rehearse("--parts", "steps")
    assert code == 1 and records["steps"]["status"] == "timed out"
    pid = int(child.read_text())
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "the process that the part had started is still there"
        time.sleep(0.05)


def test_parts_that_do_not_fit_are_left_out_by_name(rehearse):
    code, records, printed = rehearse("--minutes", "0.001", "--parts", "steps,training")
    assert code == 0 and not records
    assert printed.count("left out") == 4 and "it wants 60" in printed  # a line and a row of the table each


def test_other_code_repeats_what_has_passed_only_when_asked(rehearse, monkeypatch):
    stand_in(monkeypatch, PASSES)
    assert rehearse("--parts", "steps")[1]["steps"]["environment"]["code"] == "abc"
    _, records, printed = rehearse("--parts", "steps", code="def")
    assert records["steps"]["environment"]["code"] == "abc" and "from other code" in printed
    _, records, _ = rehearse("--parts", "steps", "--changed", code="def")
    assert records["steps"]["environment"]["code"] == "def"


def test_units_of_other_code_are_not_kept(rehearse, monkeypatch):
    unfinished = 'r = json.load(open(record)); r["units"] = {**r.get("units", {}), "a": {"status": "failed"}}; '
    stand_in(monkeypatch, unfinished + 'r["status"] = "failed"; json.dump(r, open(record, "w"))')
    rehearse("--parts", "steps")
    stand_in(monkeypatch, PASSES)
    assert "units" in rehearse("--parts", "steps")[1]["steps"]
    assert "units" not in rehearse("--parts", "steps", "--changed", code="def")[1]["steps"]


def test_sweeps_that_are_not_there_or_not_known_are_named(rehearse, tmp_path):
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text("task: no-such-task\noptimizers: [sgd_sai]\n")
    code, records, _ = rehearse("--parts", "training", "--sweeps", tmp_path / "absent.yaml", unknown)
    assert code == 0 and records["training"]["status"] == "missing"
    assert "absent.yaml" in records["training"]["units"]["absent"]["error"]
    assert "no-such-task" in records["training"]["units"]["unknown"]["error"]


ABSENT = """
from importlib.machinery import PathFinder

real = PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {names} else real(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
"""


def test_missing_packages_are_named_and_the_parts_that_need_them_too(tmp_path):
    "Packages that are not found, as on a machine that does not have them."
    names = ("transformers", "rich", "typer", "pandas", "expecttest")
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(names=names))
    command = [*REHEARSAL, "--out", str(tmp_path), "--parts", "memory,training"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    named = next(line for line in done.stdout.splitlines() if line.startswith("not installed: "))
    assert set(names) <= set(named.removeprefix("not installed: ").split(", "))
    records = {part: read(tmp_path / "cpu-quick" / f"{part}.json") for part in ("memory", "training")}
    step = records["memory"]["units"]["training step"]
    assert step["status"] == "missing" and "transformers" in step["error"]
    assert records["training"]["status"] == "missing" and "typer" in done.stdout
