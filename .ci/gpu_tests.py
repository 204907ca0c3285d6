"""A plugin for pytest that keeps what came of the tests in a JSON file, written while they run: `-p gpu_tests`, with
the file in $GPU_TESTS_RECORD.

A run that is cut off leaves its failures so far, with the last lines of their tracebacks, and the tests that were
running. The next run with the same file leaves out what has passed. A test that needs a package which is not installed
counts as missing, not as failed."""

import json
import os
import re
from collections import Counter
from pathlib import Path

RECORD = "GPU_TESTS_RECORD"
LAST_LINES = 15
NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


def write_whole(path, record):
    "Write a JSON file, all or nothing."
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_record(path):
    "A record; empty where there is none."
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def missing_module(text):
    "The package that a failure is about, if it is one that is not installed."
    found = NO_MODULE.findall(text)
    return found[-1] if found and found[-1] != "sgd_sai" else None


class Keeper:
    "What came of each test, in a file."

    def __init__(self, path):
        self.path, self.record = path, read_record(path)
        before = self.record.get("outcomes", {})  # what lacked a package is tried again
        self.outcomes = {test: outcome for test, outcome in before.items() if outcome != "missing"}
        self.failures = self.record.setdefault("failures", {})  # test -> last lines
        self.missing, self.running = {}, {}  # package -> tests; tests that have begun
        self.record |= {"status": "unfinished", "outcomes": self.outcomes, "missing": self.missing}

    def write(self):
        "Write the record."
        self.record |= {"counts": dict(Counter(self.outcomes.values())), "running": list(self.running)}
        write_whole(self.path, self.record)

    def keep(self, test, outcome, text=""):
        "Keep one outcome."
        module = missing_module(text) if outcome == "failed" else None
        self.outcomes[test] = "missing" if module else outcome
        self.failures.pop(test, None)
        if module:
            self.missing.setdefault(module, [])
            if test not in self.missing[module]:
                self.missing[module].append(test)
        elif outcome == "failed":
            self.failures[test] = text.strip().splitlines()[-LAST_LINES:]

    def pytest_runtest_logstart(self, nodeid):
        self.running[nodeid] = True
        self.outcomes.pop(nodeid, None)  # of an earlier run; a failure stays until the test has ended again
        self.write()

    def pytest_runtest_logfinish(self, nodeid):
        self.running.pop(nodeid, None)
        self.write()

    def pytest_runtest_logreport(self, report):
        ended = report.when == "call" or report.outcome != "passed"
        if ended and self.outcomes.get(report.nodeid) != "failed":
            self.keep(report.nodeid, report.outcome, report.longreprtext)

    def pytest_collectreport(self, report):
        if report.failed:
            self.keep(report.nodeid, "failed", report.longreprtext)

    def pytest_sessionfinish(self, exitstatus):
        interrupted, broken = exitstatus == 2, exitstatus in (3, 4)
        if not interrupted:
            passed = "passed" in self.outcomes.values()
            self.record["status"] = "failed" if self.failures or broken else "passed" if passed else "missing"
        self.write()
        if self.record["status"] == "passed":
            del self.record["outcomes"]  # the counts say it
            write_whole(self.path, self.record)


def pytest_configure(config):
    if RECORD in os.environ and not hasattr(config, "workerinput"):  # a worker of xdist tells the process that has it
        config.pluginmanager.register(Keeper(Path(os.environ[RECORD])), "gpu-tests-keeper")


def pytest_collection_modifyitems(config, items):
    "Leave out what has passed before."
    if RECORD in os.environ:
        outcomes = read_record(Path(os.environ[RECORD])).get("outcomes", {})
        done = [item for item in items if outcomes.get(item.nodeid) == "passed"]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if outcomes.get(item.nodeid) != "passed"]
