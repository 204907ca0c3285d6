"What `make gpu` measures: units, waits, host and device, memory, captured and compiled steps, all without a GPU."

import json
import time
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from sgd_sai.benchmarks import (
    bandwidth,
    captured_steps,
    device_memory,
    device_parts,
    device_times,
    measuring,
    step_time,
)
from sgd_sai.benchmarks.captured_steps import STEP_FORMS, StepForm, compare_steps, compiled_step
from sgd_sai.benchmarks.device_memory import memory_of_optimizers
from sgd_sai.benchmarks.device_parts import DEVICE_PARTS
from sgd_sai.benchmarks.device_records import NotAvailable, card_environment, code_digest, run_unit, run_units
from sgd_sai.benchmarks.device_times import host_seconds, split_times, synchronisations
from sgd_sai.experiments.errors import UsageError
from sgd_sai.internals import tensor_tables
from sgd_sai.muon_step import _at_a_time
from sgd_sai.sgd_sai import SGDSaI
from sgd_sai.weight_layouts import WeightLayout

SHAPES = [(8, 6), (6,)]


def raises(error):
    def unit():
        raise error

    return unit


def test_a_unit_that_raises_is_a_failure_and_the_others_go_on(tmp_path):
    path = tmp_path / "part.json"
    units = {"first": raises(ZeroDivisionError("by nothing")), "second": lambda: {"x": 1.5}}
    record = run_units(path, units)
    assert record == json.loads(path.read_text()) and record["status"] == "failed" and "running" not in record
    failed, passed = record["units"].values()
    assert failed["error"] == "ZeroDivisionError: by nothing" and failed["traceback"][-1].endswith("by nothing")
    assert passed["status"] == "passed" and passed["result"] == {"x": 1.5}
    again = run_units(path, {"first": lambda: {"y": 2}, "second": raises(AssertionError("it has passed"))})
    assert again["status"] == "passed" and again["units"]["first"]["result"] == {"y": 2}


@pytest.mark.parametrize(
    "unit, status",
    [
        (lambda: {}, "passed"),
        (lambda: {"finished": True}, "passed"),
        (lambda: {"finished": False}, "partly"),
        (lambda: {"finished": False, "problem": "wrong"}, "failed"),
        (raises(ModuleNotFoundError("No module named 'x'")), "missing"),
        (raises(UsageError("no task of that name")), "missing"),
        (raises(NotAvailable("no graphs")), "missing"),
        (raises(RuntimeError("CUDA error")), "failed"),
    ],
)
def test_how_a_unit_ends(unit, status):
    assert run_unit(unit)["status"] == status


def test_what_was_cut_off_goes_on_with_the_unit_that_was_running(tmp_path):
    path, ran = tmp_path / "part.json", []

    def unit(name, cut=False):
        def run():
            ran.append(name)
            if cut:
                raise KeyboardInterrupt
            return {}

        return run

    with pytest.raises(KeyboardInterrupt):
        run_units(path, {"a": unit("a"), "b": unit("b", cut=True), "c": unit("c")})
    left = json.loads(path.read_text())
    assert left["status"] == "unfinished" and left["running"] == "b" and list(left["units"]) == ["a"]
    record = run_units(path, {name: unit(name) for name in "abc"})
    assert ran == ["a", "b", "b", "c"] and record["status"] == "passed"


def test_the_digest_sees_every_file_of_the_package(tmp_path, monkeypatch):
    import sgd_sai

    for name, text in (("__init__.py", ""), ("sub/module.py", "x = 1\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sgd_sai, "__file__", str(tmp_path / "__init__.py"))
    before = code_digest()
    (tmp_path / "sub/module.py").write_text("x = 2\n")
    assert before != code_digest() and len(before) == 12


def test_environment_of_a_card(monkeypatch):
    properties = SimpleNamespace(total_memory=80, L2_cache_size=50, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    where = card_environment("cuda")
    assert where["card"] == "NVIDIA H100" and where["l2_bytes"] == 50 and where["processors"] == 132
    assert {"torch", "triton", "driver", "commit", "date", "code"} <= set(where)


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    "A clock, and a GPU that works on what it was given while nobody waits for it."

    class Gpu:
        now = busy_until = 0.0
        waits = 0

        def issue(self, host, device):
            self.now += host
            self.busy_until = max(self.now, self.busy_until) + device

        def wait(self):
            self.waits += 1
            self.now = max(self.now, self.busy_until)

    gpu = Gpu()
    clock = SimpleNamespace(perf_counter=lambda: gpu.now)
    for module in (measuring, device_times):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.wait)
    return gpu


def test_one_wait_after_ten_calls(gpu):
    assert measuring.seconds_of(lambda: gpu.issue(1.0, 3.0), "cuda", calls=10) == pytest.approx((1 + 30) / 10)
    assert gpu.waits == 2
    steps, others = measuring.interleave(lambda: gpu.issue(1, 3), lambda: gpu.issue(1, 1), rounds=2, device="cuda")
    assert steps == pytest.approx([3.1, 3.1]) and others == pytest.approx([1.1, 1.1])


def test_bandwidth_and_ordinary_steps_of_a_gpu_are_means_of_ten_calls(gpu, monkeypatch):
    monkeypatch.setattr(bandwidth, "_movers", lambda entries, device: {"copy": (8, lambda: gpu.issue(1.0, 3.0))})
    rates = bandwidth.bandwidth(100, "cuda", repeats=2, beside=lambda: gpu.issue(1.0, 6.0))
    assert rates["copy"]["median"] == pytest.approx(800 / 3.1)
    assert rates["copy"]["beside"] == pytest.approx(6.1 / 3.1)
    steps, step = [], SGDSaI.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: gpu.issue(0.0, 1.0))
    monkeypatch.setattr(SGDSaI, "step", lambda self: steps.append(self) or gpu.issue(0.0, 1.0) or step(self))
    times = step_time.first_step(measuring.random_parameters(SHAPES), rounds=1, device="cuda")
    assert len(steps) == 2 + 10 + 1 + 1  # warm-up, ordinary ones, measured again, a new optimizer's first
    assert times["ordinary_ms"]["median"] == pytest.approx(1e3)


def test_the_host_is_timed_without_what_is_still_running(gpu):
    gpu.issue(0.0, 100.0)  # from before: the clock starts when it is done
    assert host_seconds(lambda: gpu.issue(1.0, 50.0), "cuda") == pytest.approx(1.0)
    assert gpu.now == pytest.approx(151.0)


def test_the_device_sleeps_until_the_host_is_ahead(gpu, monkeypatch):
    slept, overwritten = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.busy_until

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    def sleep(cycles):
        slept.append(cycles / device_times._CYCLES)
        gpu.issue(0.0, slept[-1])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    buffer = SimpleNamespace(zero_=lambda: overwritten.append(True))

    def step():
        for _ in range(3):
            gpu.issue(1.0, 0.5)  # a host that is slower than the device

    assert device_times.device_seconds(step, "cuda", host=3.0, buffer=buffer) == pytest.approx(1.5)
    assert slept[0] > 3.0 and overwritten


def test_waits_are_named_by_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def f():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    places = synchronisations(f, "cuda")
    assert len(places) == 2 and places[0].startswith("benchmarks/test_gpu_parts.py:") and modes == ["warn", 0]
    with pytest.raises(ValueError, match="in the step"):
        synchronisations(raises(ValueError("in the step")), "cuda")
    assert modes[-1] == 0


def test_times_of_host_and_device_on_a_cpu():
    times = split_times(lambda: time.sleep(0.003), rounds=3)
    assert times["host_ms"]["median"] >= 3 and times["device_ms"]["median"] >= 3


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_follows_its_rule():
    record = memory_of_optimizers(["adamw"], SHAPES)
    assert "problem" not in record
    adamw = record["optimizers"]["adamw"]
    assert adamw["state_bytes"] == 2 * adamw["parameter_bytes"] + 2 * 4 and adamw["blocks"] is None


def test_a_state_that_differs_from_its_rule_is_a_problem(monkeypatch):
    real = device_memory.state_bytes
    monkeypatch.setattr(device_memory, "state_bytes", lambda opt: real(opt) + isinstance(opt, SGDSaI))
    record = memory_of_optimizers(["sgd_sai"], SHAPES)
    assert record["problem"] == "the state differs from its rule: sgd_sai"


# --- captured and compiled ------------------------------------------------------------------------------------------


def test_steps_that_are_left_out_or_made_with_another_rate_are_found():
    form = STEP_FORMS["SGDSaI"]
    same = compare_steps(form, SHAPES, "cpu", lambda opt: opt.step, rounds=2)
    assert same["difference"] <= form.tolerance and "problem" not in same
    assert "differ" in compare_steps(form, SHAPES, "cpu", lambda opt: lambda: None, rounds=2)["problem"]

    def with_the_first_rate(opt):
        for group in opt.param_groups:
            group["lr"] = group["lr"].item()  # as a graph that has recorded a number
        return opt.step

    assert "differ" in compare_steps(form, SHAPES, "cpu", with_the_first_rate, rounds=2)["problem"]


def test_difference_is_infinite_where_nothing_moved():
    still = [torch.ones(3)]
    assert captured_steps.largest_difference(still, still, still) == float("inf")


def test_a_form_that_is_refused_is_not_available():
    with pytest.raises(NotAvailable, match="fused"):
        compare_steps(StepForm(SGDSaI, {"fused": True, "foreach": True}), SHAPES, "cpu", lambda opt: opt.step)


def test_compiled_step_is_the_step():
    record = compare_steps(STEP_FORMS["SGDSaI"], SHAPES, "cpu", lambda opt: compiled_step(opt, "eager"), rounds=2)
    assert record["difference"] <= 1e-4 and record["other_ms"]["median"] > 0


def test_newton_schulz_compiled_is_what_it_is_uncompiled(monkeypatch):
    record = captured_steps.compare_newton_schulz((3, 24, 40), "cpu", "eager", rounds=2)
    assert record["difference"] <= record["tolerance"] and "problem" not in record
    assert all(record[key]["median"] > 0 for key in ("ms", "other_ms", "ratio")) and record["compile_seconds"] > 0
    seen = []

    def one_iteration_less(f, backend):
        return lambda X: seen.append((backend, X.dtype, tuple(X.shape))) or f(X, iterations=4)

    monkeypatch.setattr(torch, "compile", one_iteration_less)
    record = captured_steps.compare_newton_schulz((3, 24, 40), "cpu", "eager", rounds=2)
    assert "differ" in record["problem"] and run_unit(lambda: record)["status"] == "failed"
    assert seen == [("eager", torch.bfloat16, (3, 24, 40))] * 3


def test_newton_schulz_is_measured_on_the_matrices_of_gpt2():
    "All matrices of a shape, and as many as a step takes at a time on a GPU, for which the meta device stands in."
    hidden = Counter(shape for shape in device_parts.DEVICE_SHAPES["gpt2"]() if len(shape) == 2 and shape[0] < 4000)
    whole = {(n, *sorted(shape)) for shape, n in hidden.items() if n > 1}
    at_a_time = {
        (_at_a_time(torch.empty(rows, cols, device="meta"), WeightLayout()), rows, cols) for _, rows, cols in whole
    }
    stacks = set(device_parts.NEWTON_SCHULZ_STACKS)
    assert len(whole) == 3 and whole < stacks and stacks - whole < at_a_time
    units = DEVICE_PARTS["compile"]("cuda")
    measured = [unit.args[:2] for name, unit in units.items() if name.startswith(device_parts.NEWTON_SCHULZ)]
    assert measured == [(stack, "cuda") for stack in device_parts.NEWTON_SCHULZ_STACKS]
    assert "Newton-Schulz, 12 x 768 x 3072" in units


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", DEVICE_PARTS)
def test_every_part_has_units_for_a_gpu(part):
    "Their functions are called on a GPU alone; here they exist, with names that say what is measured."
    units = DEVICE_PARTS[part]("cuda")
    assert len(units) >= 3 and all(map(callable, units.values()))


@pytest.mark.parametrize("part", ["steps", "first"])
def test_what_triton_would_be_as_the_default_is_measured(part, monkeypatch):
    "On a GPU alone, within the measurement alone, and also when it fails."
    monkeypatch.setattr(device_parts, "has_triton", lambda: True)
    seen = []

    def measure(*args, **kwargs):
        seen.append(tensor_tables.TRITON_IS_DEFAULT)
        raise KeyError("measured")

    for name in ("measure_speed", "first_step"):
        monkeypatch.setattr(device_parts, name, measure)
    monkeypatch.setattr(device_parts, "random_parameters", lambda *args: [])
    units = DEVICE_PARTS[part]("cuda")
    for name in ("gpt2", "gpt2" + device_parts.BY_TRITON):
        with pytest.raises(KeyError, match="measured"):
            units[name]()
    assert seen == [False, True] and not tensor_tables.TRITON_IS_DEFAULT
    assert not any(device_parts.BY_TRITON in name for name in DEVICE_PARTS[part]("cpu"))


def test_shapes_are_those_of_the_models():
    shapes = device_parts.DEVICE_SHAPES
    assert sum(torch.Size(s).numel() for s in shapes["gpt2"]()) == 124_439_808
    assert shapes[device_parts.SMALL_TENSORS]() == [(256,)] * 2000
