"Whether Triton's kernels are the default exactly where records of GPUs say so; the records are made up here."

import json
from pathlib import Path

import pytest

from sgd_sai.analysis.gpu_tables import read_gpu_records
from sgd_sai.analysis.triton_verdict import triton_should_be_default, triton_wins
from sgd_sai.internals import tensor_tables

RECORDS = Path(__file__).resolve().parents[2] / "results" / "gpu"
BEFORE, AFTER = "gpt2", "gpt2, Triton by default"
A_TEST = "tests/core/test_triton_step.py::test_on_a_gpu"


def timed(**ratios):
    "A unit in which the time of a step spreads by a tenth around these numbers of the reference's."
    rows = {
        name.replace("__", "-"): {"ratio": {"low": 0.9 * r, "median": r, "high": 1.1 * r}} for name, r in ratios.items()
    }
    return {"status": "passed", "result": {"optimizers": rows}}


def steps(triton, foreach=2.0, default=2.0):
    return {BEFORE: timed(sgd_sai__foreach=foreach, sgd_sai=default), AFTER: timed(sgd_sai=triton)}


def ran_tests(status="passed", failures=(), missing=None):
    return {"status": status, "failures": dict.fromkeys(failures, []), "missing": missing or {}}


def save(folder, card, units=None, tests=None):
    "The records of one card, as `make gpu` writes them."
    given = {"steps": units and {"status": "passed", "units": units}, "tests": tests}
    for part, record in given.items():
        path = folder / card / f"{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if record is not None:
            head = {"part": part, "device": "cuda", "quick": False, "environment": {"card": card}}
            path.write_text(json.dumps(head | record))


CRASHED = {"status": "failed", "error": "RuntimeError: CUDA error"}
LACKS = {"status": "missing", "error": "No module named 'transformers'"}
WON = (steps(1.0), ran_tests())
CARDS = {  # what one card measured, and the verdict
    "faster and right": (*WON, True),
    "other tests failed": (steps(1.0), ran_tests("failed", ["tests/core/test_adan.py::test_x"]), True),
    "other tests lack a package": (
        steps(1.0),
        ran_tests(missing={"expecttest": ["tests/core/test_adan.py"]}),
        True,
    ),
    "already the default": (steps(1.0, foreach=2.0, default=1.0), ran_tests(), True),
    "slower": (steps(2.5), ran_tests(), False),
    "within the quartiles": (steps(1.7), ran_tests(), False),
    "a test of it failed": (steps(1.0), ran_tests("failed", [A_TEST]), False),
    "a test of it failed before time was up": (steps(1.0), ran_tests("timed out", [A_TEST]), False),
    "a test of it failed, nothing timed": (None, ran_tests("failed", [A_TEST]), False),
    "slower, no tests": (steps(2.5), None, False),
    "it crashed": ({**steps(1.0), AFTER: CRASHED}, ran_tests(), False),
    "it could not be timed": ({**steps(1.0), AFTER: timed()}, ran_tests(), False),
    "no tests": (steps(1.0), None, None),
    "tests were cut off": (steps(1.0), ran_tests("timed out"), None),
    "a test of it lacks a package": (steps(1.0), ran_tests(missing={"x": [A_TEST]}), None),
    "the other way was not timed": ({AFTER: timed(sgd_sai=1.0)}, ran_tests(), None),
    "it was not timed": ({BEFORE: timed(sgd_sai__foreach=2.0)}, ran_tests(), None),
    "the model could not be built": ({BEFORE: LACKS, AFTER: LACKS}, ran_tests(), None),
    "nothing timed": (None, ran_tests(), None),
}


@pytest.mark.parametrize("what", CARDS)
def test_verdict_on_a_card(tmp_path, what):
    units, ran, verdict = CARDS[what]
    save(tmp_path, "a card", units, ran)
    assert triton_wins(read_gpu_records(tmp_path)) == {"a card": verdict}


def assert_default_follows(folder):
    "The check of the constant against records."
    assert tensor_tables.TRITON_IS_DEFAULT == triton_should_be_default(read_gpu_records(folder))


def test_triton_is_the_default_exactly_where_it_was_measured_to_win():
    assert_default_follows(RECORDS)


@pytest.mark.parametrize(
    "cards, default",
    [
        ([], False),
        (["faster and right"], True),
        (["faster and right", "already the default"], True),
        (["faster and right", "nothing timed"], True),
        (["faster and right", "slower"], False),
        (["faster and right", "a test of it failed"], False),
        (["slower"], False),
        (["no tests"], False),
    ],
)
def test_a_default_that_contradicts_records_is_found(tmp_path, monkeypatch, cards, default):
    for what in cards:
        save(tmp_path, what, *CARDS[what][:2])
    monkeypatch.setattr(tensor_tables, "TRITON_IS_DEFAULT", default)
    assert_default_follows(tmp_path)
    monkeypatch.setattr(tensor_tables, "TRITON_IS_DEFAULT", not default)
    with pytest.raises(AssertionError):
        assert_default_follows(tmp_path)
