"Tables of what GPUs measured, from records that no GPU has made: parts that are missing, failed, cut off; two cards."

import json

import pytest

from sgd_sai.analysis import gpu_tables as page
from sgd_sai.analysis.gpu_tables import (
    GPU_TARGETS,
    NOT_MEASURED,
    gpu_compared_table,
    gpu_first_table,
    gpu_left_out,
    gpu_memory_table,
    gpu_newton_schulz_table,
    gpu_part_table,
    gpu_step_table,
    gpu_target_table,
    gpu_targets,
    gpu_training_table,
    read_gpu_records,
)
from sgd_sai.benchmarks import device_parts

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def middle(x):
    return {"low": 0.9 * x, "median": x, "high": 1.1 * x}


def speed(ratio, adamw=1.5, floor=1.1):
    "A record of step times in which torch's fused SGD takes a millisecond."
    rows = {}
    for name, label, r in (
        ("sgd-fused", "torch SGD, fused", 1.0),
        ("sgd_sai", "SGDSaI", ratio),
        ("adamw-fused", "torch AdamW, fused", adamw),
    ):
        times = {key: middle(r) for key in ("ms", "ratio", "host_ms", "device_ms")}
        rows[name] = {"label": label, "times_floor": middle(floor * r), "peak_bytes": 400, **times}
    return {"parameters": 1000, "optimizers": rows, "absent": {"x": "SGDSaI, other: no such kernel"}}


def first(gsnr=0.8, waits=("sgd_sai/init_scales.py:40",)):
    times = {"ordinary_ms": middle(1.0), "gsnr": middle(gsnr), "with_allocation": middle(2 * gsnr)}
    return times | {"waits": {"first": list(waits), "later": []}}


def memory(peak=1e4):
    kept = dict.fromkeys(("rule_bytes", "state_bytes", "rule_blocks", "blocks", "parameter_bytes"), 4_000_000)
    return {"optimizers": {"sgd_sai": kept | {"peak": peak, "first_peak": 5e5}}}


def compared(difference=1e-7):
    return {"difference": difference, "ms": middle(1.0), "other_ms": middle(0.5), "ratio": middle(0.5)}


def record(part, card=H100, status="passed", device="cuda", **more):
    where = {"card": card, "date": "2027-01-02T03:04:05+00:00", "commit": None, "code": "abc123", "torch": "2.11"}
    return {"part": part, "status": status, "device": device, "quick": False, "environment": where, **more}


def passed(**results):
    return {name: {"status": "passed", "result": result} for name, result in results.items()}


FAILED = {"status": "failed", "error": "RuntimeError: CUDA error"}


def complete(card, ratio):
    "All parts of one card."
    models = {"gpt2": ratio, "gpt2-medium": ratio, "2000x256": 0.9}
    return {
        "tests": record("tests", card, failures={}, missing={}, counts={"passed": 5}),
        "steps": record("steps", card, units=passed(**{name: speed(r) for name, r in models.items()})),
        "first": record("first", card, units=passed(**{name: first() for name in models})),
        "memory": record("memory", card, units=passed(**{"gpt2": memory(), "gpt2-medium": memory()})),
        "graphs": record("graphs", card, units=passed(SGDSaI=compared())),
        "compile": record("compile", card, units=passed(SGDSaI=compared())),
        "notebooks": record("notebooks", card, units=passed(page={})),
    }


def save(folder, *records):
    for item in records:
        path = folder / item["environment"]["card"].lower().replace(" ", "-") / f"{item['part']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(item))
    return folder


def by_target(parts):
    return {row["target"]: row for row in gpu_targets(parts)}


def test_records_of_two_cards_are_read_and_rehearsals_are_not(tmp_path):
    save(tmp_path, *complete(H100, 1.0).values(), *complete(H200, 1.2).values())
    save(tmp_path, record("steps", "cpu", device="cpu"), record("steps", "Toy") | {"quick": True})
    save(tmp_path, record("something else", "Toy"))
    cards = read_gpu_records(tmp_path)
    assert list(cards) == [H100, H200] and list(cards[H100]) == sorted(complete(H100, 1.0))
    assert read_gpu_records(tmp_path / "absent") == {}


def test_targets_of_a_complete_card():
    rows = by_target(complete(H100, 1.04))
    assert all(row["measured"] is not None for row in rows.values()) and len(rows) == len(GPU_TARGETS)
    assert all(row["holds"] for row in rows.values())
    assert rows["GPT-2 small: step of SGDSaI / torch SGD with momentum, fused"]["measured"] == 1.04
    assert rows["GPT-2 small: step of SGDSaI / torch AdamW, fused"]["measured"] == pytest.approx(1.04 / 1.5)
    assert rows["GPT-2 medium: step of SGDSaI / the floor of memory"]["measured"] == pytest.approx(1.1 * 1.04)
    assert rows["GPT-2 small: temporary memory of a step / parameters"]["measured"] == 0.0025
    assert rows["GPT-2 small: g-SNR at the first step / an ordinary step"]["measured"] == 0.8
    assert rows["GPT-2 medium: waits of the host in the first step"]["measured"] == 1


@pytest.mark.parametrize(
    "part, units, target",
    [
        ("steps", passed(gpt2=speed(1.06)), "GPT-2 small: step of SGDSaI / torch SGD with momentum, fused"),
        ("steps", passed(gpt2=speed(1.0, adamw=1.3)), "GPT-2 small: step of SGDSaI / torch AdamW, fused"),
        ("steps", passed(gpt2=speed(1.0, floor=1.16)), "GPT-2 small: step of SGDSaI / the floor of memory"),
        ("steps", passed(**{"2000x256": speed(1.01)}), "2,000 tensors of 256: step of SGDSaI / torch SGD, fused"),
        ("first", passed(gpt2=first(1.1)), "GPT-2 small: g-SNR at the first step / an ordinary step"),
        ("first", passed(gpt2=first(waits="ab")), "GPT-2 small: waits of the host in the first step"),
        ("memory", passed(gpt2=memory(peak=5e4)), "GPT-2 small: temporary memory of a step / parameters"),
    ],
)
def test_a_number_above_its_limit_does_not_hold(part, units, target):
    row = by_target({part: record(part, units=units)})[target]
    assert row["holds"] is False and row["measured"] > row["limit"]


@pytest.mark.parametrize("part, word", [("graphs", "captured"), ("compile", "compiled"), ("memory", "state")])
def test_units_that_failed_are_counted_when_all_have_ended(part, word):
    target = next(row.text for row in GPU_TARGETS if word in row.text)
    units = passed(a=compared()) | {"b": FAILED}
    assert by_target({part: record(part, status="failed", units=units)})[target]["measured"] == 1
    for status in ("timed out", "crashed", "unfinished"):
        row = by_target({part: record(part, status=status, units=units)})[target]
        assert row["measured"] is row["holds"] is None


def test_tests_that_cannot_run_are_not_among_those_that_hold():
    target = "tests for a GPU that fail or cannot run"
    tests = record("tests", failures={}, missing={"expecttest": ["a", "b"]}, counts={"passed": 1, "missing": 2})
    assert by_target({"tests": tests})[target]["measured"] == 2
    tests = record("tests", status="timed out", failures={"c": ["E"]}, counts={"failed": 1})
    assert by_target({"tests": tests})[target]["measured"] is None


def test_a_part_that_failed_has_no_number_but_a_note():
    parts = {"steps": record("steps", status="failed", units={"gpt2": FAILED})}
    rows = by_target(parts)
    assert rows["GPT-2 small: step of SGDSaI / torch SGD with momentum, fused"]["measured"] is None
    table = gpu_part_table({H100: parts}).set_index("part")
    assert table["status"].to_dict() == dict.fromkeys(page.GPU_PARTS, NOT_MEASURED) | {"steps": "failed"}
    assert table.loc["steps", "notes"] == "gpt2: RuntimeError: CUDA error" and table.loc["steps", "code"] == "abc123"
    assert len(gpu_step_table({H100: parts}, "gpt2")) == 0


def test_notes_name_tests_packages_and_what_was_running():
    tests = record(
        "tests", status="timed out", failures={"t.py::bad": []}, missing={"x": ["t.py"]}, running=["t.py::h"]
    )
    notes = gpu_part_table({H100: {"tests": tests}})["notes"][0]
    assert notes == "t.py::bad; without x; while running: t.py::h"


def test_two_cards_stand_beside_each_other():
    cards = {H100: complete(H100, 1.0), H200: {"steps": record("steps", H200, units=passed(gpt2=speed(1.2)))}}
    table = gpu_target_table(cards).set_index("target")
    row = table.loc["GPT-2 small: step of SGDSaI / torch SGD with momentum, fused"]
    assert row[H100] == "1.00, holds" and row[H200] == "1.20, **does not hold**" and row["at most"] == "1.05"
    assert table.loc["tests for a GPU that fail or cannot run", H200] == NOT_MEASURED
    steps = gpu_step_table(cards, "gpt2")
    assert list(steps["card"]) == [H100] * 3 + [H200] * 3 and steps["temporary, % of parameters"][0] == "10.0"
    assert len(gpu_left_out(cards)) == 4 and gpu_left_out(cards)[0].startswith(f"{H100}, gpt2: SGDSaI, other")


def test_other_tables():
    cards = {H100: complete(H100, 1.0)}
    cards[H100]["graphs"]["units"] |= {
        "Adan": FAILED,
        "MuonSaI": {"status": "failed", "error": "they differ", "result": compared(0.3)},
    }
    graphs = gpu_compared_table(cards, "graphs").set_index("step")
    assert graphs.loc["SGDSaI", "the same"] == "yes, up to 1e-07" and graphs.loc["SGDSaI", "ratio"] == "0.5"
    assert graphs.loc["MuonSaI", "the same"] == "**no**, up to 3e-01" and "CUDA error" in graphs.loc["Adan", "the same"]
    assert gpu_first_table(cards)["waits at"][0] == "sgd_sai/init_scales.py:40"
    assert gpu_memory_table(cards)["kept"][0] == "4.0"


def test_newton_schulz_has_a_table_of_its_own_and_is_no_compiled_step():
    slow = {"status": "failed", "error": "they differ", "result": compared(0.3) | {"compile_seconds": 4.0}}
    fast = passed(a=compared(0.02) | {"compile_seconds": 2.5})["a"]
    units = {
        "Newton-Schulz, 2 x 768 x 768": fast,
        "Newton-Schulz, 12 x 768 x 768": slow,
        "Newton-Schulz, 1 x 2": FAILED,
    }
    parts = {"compile": record("compile", status="failed", units=passed(SGDSaI=compared()) | units)}
    table = gpu_newton_schulz_table({H100: parts}).set_index("matrices")
    assert list(table.index) == ["2 x 768 x 768", "12 x 768 x 768", "1 x 2"] and set(table["card"]) == {H100}
    assert table.loc["2 x 768 x 768", "the same"] == "yes, up to 2e-02"
    numbers = table.loc["2 x 768 x 768", ["as it is, ms", "compiled, ms", "ratio", "quartiles", "to compile, s"]]
    assert list(numbers) == ["1.00", "0.5", "0.5", "0.45 to 0.55", "2.50"]
    assert table.loc["12 x 768 x 768", "the same"] == "**no**, up to 3e-01"
    assert table.loc["1 x 2", "the same"] == "failed: RuntimeError: CUDA error" and table.loc["1 x 2", "ratio"] == ""
    assert list(gpu_compared_table({H100: parts}, "compile")["step"]) == ["SGDSaI"]
    target = next(row.text for row in GPU_TARGETS if "compiled" in row.text)
    assert by_target(parts)[target]["measured"] == 0
    assert len(gpu_newton_schulz_table({})) == len(gpu_newton_schulz_table({H100: {}})) == 0


def test_training_runs_are_averaged_over_seeds(tmp_path, monkeypatch):
    (tmp_path / "card" / "runs").mkdir(parents=True)

    def runs(folder, task):
        made = [("adamw", 0.1, 1.5), ("adamw", 0.1, 1.7), ("sgd_sai", 0.2, 1.4)] if task == "python-gpt2" else []
        for optimizer, lr, loss in made:
            more = {"environment": {"device": f"cuda: {H100}"}, "ms_per_step": middle(3.0)}
            yield {"optimizer": optimizer, "hyperparameters": {"lr": lr}, "best": {"val_loss": loss}, **more}

    monkeypatch.setattr(page, "load_runs", runs)
    table = gpu_training_table(tmp_path)
    assert list(table["runs"]) == [2, 1] and list(table["loss"]) == [1.6, 1.4] and set(table["task"]) == {"python-gpt2"}
    assert len(gpu_training_table(tmp_path / "absent")) == 0


def test_parts_and_shapes_are_those_of_the_command():
    assert set(device_parts.DEVICE_PARTS) < set(page.GPU_PARTS)
    assert set(page._MODELS) | {"2000x256"} == set(device_parts.DEVICE_SHAPES)
