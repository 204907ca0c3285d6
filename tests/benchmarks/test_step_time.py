"Step times: what is timed and counted, records, and the command line, all on tensors too small to measure."

import contextlib
import json
import os
import time
import weakref

import psutil
import pytest
import torch
from typer.testing import CliRunner

from sgd_sai.adahessian import adahessian_reference
from sgd_sai.benchmarks import measuring, small_tensors
from sgd_sai.benchmarks import step_time_figures as figures
from sgd_sai.benchmarks.bandwidth import bandwidth
from sgd_sai.benchmarks.measuring import interleave, quartiles, random_parameters
from sgd_sai.benchmarks.small_tensors import busy_cores, measure_busy, measure_series
from sgd_sai.benchmarks.step_time import (
    StepTogether,
    benchmark,
    build_for_benchmark,
    choose,
    measure_speed,
    prepared,
    speed_path,
)
from sgd_sai.benchmarks.step_time_tables import TARGETS, speed_notes, speed_table, speed_targets
from sgd_sai.cli.app import app
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.optimizer_entry import OptimizerEntry, Traffic, traffic_bytes
from sgd_sai.experiments.optimizers import get_optimizer, optimizer_names
from sgd_sai.experiments.peers import authors_sgd_sai

ENTRIES = {name: get_optimizer(name) for name in optimizer_names("benchmark")}
SHAPES = [(7, 5), (6,), (2, 3, 3, 3)]


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def absent(name):
    "True if an optimizer needs something that is not here: a package that has to be fetched."
    if name == "authors":
        try:
            authors_sgd_sai()
        except RuntimeError:
            return True
    return False


@pytest.fixture(scope="module")
def record():
    return measure_speed(
        [(60, 50)] * 3, choose(["sgd_sai", "adamw-fused", "adamw-foreach", "authors", "po-sgdsai", "adan"]), rounds=3
    )


def test_optimizers_that_share_the_parameters_are_timed_as_one():
    params = random_parameters([(64, 48), (5000, 8), (48,)])
    opt = build_for_benchmark(get_optimizer("muon-adamw", "benchmark"), params)
    muon, adamw = opt.optimizers
    assert [group["params"] for group in muon.param_groups] == [params[:1]]  # the table is too long for a matrix
    assert [group["params"] for group in adamw.param_groups] == [params[1:]] and adamw.defaults["fused"]
    opt.step()
    assert all(p in muon.state or p in adamw.state for p in params)
    result = measure_speed([(64, 48), (5000, 8)], choose(["muon_sai-sign", "muon-adamw"]), rounds=3)
    assert set(result["optimizers"]) >= {"muon_sai-sign", "muon-adamw"}, result.get("skipped")


# --- what is timed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if not entry.benchmark.compiled])
def test_every_optimizer_steps_and_its_arrays_are_those_of_its_state(name):
    if absent(name):
        pytest.skip("the authors' package is not in the cache and cannot be fetched")
    entry, params = ENTRIES[name], random_parameters(SHAPES)
    traffic = entry.traffic
    opt = build_for_benchmark(entry, params)
    if isinstance(opt, StepTogether):
        pytest.skip("parameters of its optimizers have different arrays")
    opt.step()
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3  # another gradient, or averages would stand still
    before = [{key: value.clone() for key, value in opt.state[p].items() if torch.is_tensor(value)} for p in params]
    opt.step()
    for p, old in zip(params, before, strict=True):
        full = {key for key, value in opt.state[p].items() if torch.is_tensor(value) and value.numel() == p.numel()}
        assert len(full) == len(set(traffic.reads) - set("pgD")), (
            full,
            traffic.reads,
        )  # D is handed to AdaHessian and is no state
        changed = {key for key in full if not torch.equal(opt.state[p][key], old[key])}
        assert len(changed) == len(set(traffic.writes) - {"p"}), (changed, traffic.writes)
        widths = {opt.state[p][key].element_size() for key in full}
        assert widths <= {4, *map(int, traffic.widths.values())} and (
            not traffic.widths or widths == set(map(int, traffic.widths.values()))
        )


def test_bytes_are_those_of_the_equations():
    found = {
        name: traffic_bytes(ENTRIES[name])
        for name in (
            "sgd-plain",
            "sgd_sai-plain",
            "sgd_sai",
            "authors",
            "adamw-loop",
            "adan",
            "adahessian",
            "prodigy",
            "adam-mini",
        )
    }
    assert list(found.values()) == [12, 12, 20, 20, 28, 44, 32, 48, 24]
    assert traffic_bytes(ENTRIES["sgd_sai-bf16"]) == 16
    assert traffic_bytes(ENTRIES["sgd_sai-int8"]) == 14 + 2 * 4 / 256


def test_adahessian_is_timed_with_the_steps_that_it_would_make():
    [p] = random_parameters([(4, 3)])
    opt = build_for_benchmark(ENTRIES["adahessian"], [p])
    opt.param_groups[0]["lr"] = 0.1
    before, g = p.detach().clone(), p.grad.clone()
    opt.step()
    theta = adahessian_reference(before, g, opt.given[p], {}, lr=0.1, weight_decay=0.01)
    torch.testing.assert_close(p.data, theta)


def test_usual_entries_come_without_a_compiler():
    assert not any(entry.benchmark.compiled for entry in choose().values())
    assert {name for name in choose(compiled=True)} - {name for name in choose()} == {
        "sgd_sai-compiled",
        "sgd-compiled",
    }
    with pytest.raises(UsageError):
        choose(["nobody"])


# --- measuring ------------------------------------------------------------------------------------------------------


class Clock:
    "Time that passes when a test says so, in place of the module `time`."

    now = 0.0

    def perf_counter(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measuring, "time", clock)
    return clock


def test_twice_the_work_is_a_ratio_of_two(clock, monkeypatch):
    step = torch.optim.SGD.step

    def timed_step(self, closure=None):
        clock.work(0.01)
        step(self)

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            super().step()

    monkeypatch.setattr(torch.optim.SGD, "step", timed_step)
    twice = OptimizerEntry("twice", Twice, settings={"momentum": 0.9, "fused": True})
    rows, missing = benchmark(random_parameters([(5, 10)]), {"twice": twice}, rounds=31)
    assert rows["twice"]["ratio"] == pytest.approx({"low": 2, "median": 2, "high": 2})
    assert rows["twice"]["ms"]["median"] == pytest.approx(20) and rows["twice"]["rounds"] == 31
    assert rows["sgd-fused"]["ratio"] == {"low": 1, "median": 1, "high": 1} and not missing


def test_turns_alternate_and_a_budget_ends_them(clock):
    order, rounds = [], []
    interleave(lambda: order.append("a"), lambda: order.append("b"), rounds=4, on_round=rounds.append)
    assert "".join(order) == "baabbaab" and rounds == [1, 2, 3, 4]
    mine, theirs = interleave(lambda: clock.work(0.05), lambda: None, rounds=1000, budget=0.12)
    assert mine == pytest.approx([0.05] * 3) and theirs == [0] * 3
    assert len(interleave(lambda: clock.work(0.02), lambda: None, budget=0.0)[0]) == 1


def test_quartiles_of_one_and_of_many():
    assert quartiles([2.0]) == {"low": 2, "median": 2, "high": 2} and quartiles([1, 2, 3, 4, 5]) == {
        "low": 2,
        "median": 3,
        "high": 4,
    }


def test_bandwidth_is_positive_and_counts_what_a_copy_reads_before_it_writes():
    found = bandwidth(1 << 14, repeats=2)
    assert {kind: rate["bytes"] for kind, rate in found.items()} == {
        "copy": 12,
        "triad": 16,
        "axpy": 12,
        "update": 20,
        "pieces": 20,
    }
    assert all(0 < rate["median"] <= rate["best"] for rate in found.values())


def test_parameters_and_gradients_are_the_same_on_every_call_and_leave_the_global_stream_alone():
    torch.manual_seed(5)
    one = random_parameters(SHAPES)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    for p, q in zip(one, random_parameters(SHAPES), strict=True):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad)


def test_record_is_plain_and_complete(record):
    again = json.loads(json.dumps(record))
    assert again == record
    assert (record["parameters"], record["tensors"], record["rounds"], record["reference"]) == (9000, 3, 3, "sgd-fused")
    assert (
        record["threads"] == torch.get_num_threads()
        and record["torch"] == torch.__version__
        and record["device"] == "cpu"
    )
    rates = record["bandwidth"]
    assert rates["used"] == max(rate["median"] for when in ("before", "after") for rate in rates[when].values())
    for name, row in record["optimizers"].items():
        assert row["bytes"] == traffic_bytes(ENTRIES[name]) and len(row["seconds"]) == row["rounds"]
        assert row["floor_ms"] * row["times_floor"]["median"] == pytest.approx(row["ms"]["median"])
        assert row["times_floor"]["median"] * row["floor_ratio"] == pytest.approx(row["ratio"]["median"])
        for key in ("ms", "ratio", "times_floor"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
    assert set(record["first_step"]) == {"ordinary_ms", "gsnr", "with_allocation", "sgd_allocation", "rounds"}


def test_temporary_memory_is_what_a_step_allocates(record):
    parameters = 4 * record["parameters"]
    assert record["optimizers"]["sgd_sai"]["peak_bytes"] < 0.01 * parameters
    assert 0.9 * parameters < record["optimizers"]["adamw-foreach"]["peak_bytes"] < 1.5 * parameters


def test_state_of_an_optimizer_is_gone_before_the_next():
    built = []

    def build(params):
        assert not any(ref() for ref in built), "the last optimizer is still there"
        opt = torch.optim.SGD(params, lr=1e-9, momentum=0.9)
        built.append(weakref.ref(opt))
        return opt

    benchmark(
        random_parameters(SHAPES),
        {str(i): OptimizerEntry(str(i), build, traffic=Traffic("pgm", "pm")) for i in range(3)},
        rounds=2,
    )
    assert len(built) == 3


def test_what_cannot_be_measured_is_left_out_with_a_line():
    def missing(params):
        raise ImportError("No module named 'elsewhere'\nmore\nlines")

    broken = {"missing": OptimizerEntry("missing", missing, traffic=Traffic("pg", "p"))}
    record = measure_speed(SHAPES, broken, rounds=2)
    assert record["absent"] == {"missing": "missing: No module named 'elsewhere'"} and list(record["optimizers"]) == [
        "sgd-fused"
    ]
    assert "left out: missing: No module named 'elsewhere'" in speed_notes(record) and record["first_step"] is None


def test_compiler_that_fails_is_one_line(monkeypatch):
    def compiled(f):
        def g():
            raise ValueError("no C++ compiler\nfound")

        return g

    monkeypatch.setattr(torch, "compile", compiled)
    rows, missing = benchmark(random_parameters(SHAPES), choose(["sgd_sai-compiled"]), rounds=2)
    assert list(rows) == ["sgd-fused"] and missing == {
        "sgd_sai-compiled": "SGDSaI, torch.compile: torch.compile: ValueError: no C++ compiler"
    }


def test_compiled_step_says_how_it_was_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)
    step, note = prepared(ENTRIES["sgd_sai-compiled"], random_parameters(SHAPES))
    step()
    assert note.startswith("graphs: ")


# --- small tensors and busy cores -----------------------------------------------------------------------------------


def test_series_has_every_point():
    series = {"same total": [(1, 64), (4, 16)], "same size": [(2, 8)]}
    record = measure_series(choose(["sgd_sai"]), rounds=2, series=series)
    assert {name: [(p["tensors"], p["entries"]) for p in points] for name, points in record["series"].items()} == series
    assert all(
        set(point["optimizers"]) == {"sgd-foreach", "sgd_sai"}
        for points in record["series"].values()
        for point in points
    )
    assert len({n * size for n, size in small_tensors.SERIES["same total"]}) == 1


def test_busy_cores_are_busy_and_stop():
    "They use a processor as long as the context lasts, however little of it a busy machine leaves them."
    me, deadline = psutil.Process(), time.monotonic() + 120
    with busy_cores(1):
        (child,) = [p for p in me.children() if "torch.set_num_threads(1)" in " ".join(p.cmdline())]
        ready = child.cpu_times().user
        while child.cpu_times().user < ready + 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert child.cpu_times().user >= ready + 0.1
    assert not child.is_running()


def test_busy_record_has_both_times(monkeypatch):
    monkeypatch.setattr(small_tensors, "busy_cores", contextlib.nullcontext)
    record = measure_busy([(16,)] * 5, choose(["sgd_sai"]), rounds=2, budget=1.0)
    assert (
        set(record["optimizers"]) == set(record["busy"]) == {"sgd-foreach", "sgd_sai"}
        and json.loads(json.dumps(record)) == record
    )


# --- figures, tables, targets ---------------------------------------------------------------------------------------


def test_figures_draw(record):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    series = measure_series(
        choose(["sgd_sai"]), rounds=2, series={"same total": [(1, 64), (4, 16)], "same size": [(2, 8)]}
    )
    busy = {**record, "busy": record["optimizers"]}
    costs = {"x": {"optimizers": {"sgdm": {"ms": {"median": 2.0}, "optimizer_ms": {"median": 0.5}}}}}
    drawn = [
        figures.plot_ratios(record),
        figures.plot_bandwidth(record),
        figures.plot_models({"a": record, "b": record}),
        figures.plot_series(series),
        figures.plot_busy(busy),
        figures.plot_extras(record),
        figures.plot_shares(costs),
    ]
    for figure in drawn:
        figure.canvas.draw()
        assert all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.axes)
        plt.close(figure)


def test_targets_come_from_records(record):
    rows = {row["target"]: row for row in speed_targets({"gpt2": record, "busy": None})}
    assert len(rows) == len(TARGETS) == 9
    optimizers = record["optimizers"]
    assert rows["SGDSaI / torch AdamW, fused"]["measured"] == pytest.approx(
        optimizers["sgd_sai"]["ratio"]["median"] / optimizers["adamw-fused"]["ratio"]["median"]
    )
    assert rows["SGDSaI / its traffic floor"]["measured"] == optimizers["sgd_sai"]["times_floor"]["median"]
    busy = rows["the same while every core is busy"]
    assert busy["measured"] is None and not busy["met"]
    assert all(row["met"] == (row["measured"] <= row["limit"]) for row in rows.values() if row["measured"] is not None)


def test_table_fits_into_80_columns(record):
    console = pytest.importorskip("rich.console").Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(speed_table(record, "gpt2-medium"))
    assert "…" not in console.export_text()


# --- command line ---------------------------------------------------------------------------------------------------


def test_command_prints_a_table_and_keeps_a_record(tmp_path):
    done = cli("speed", "3x40", "-o", "sgd_sai,adan", "--rounds", 3, "--out", tmp_path)
    assert done.exit_code == 0 and "Adan" in done.output and "floor" in done.output, done.output
    record = json.loads(speed_path(tmp_path, "3x40").read_text())
    assert (
        list(record["optimizers"]) == ["sgd-fused", "sgd_sai", "adan"]
        and record["environment"]["torch"] == torch.__version__
        and record["tensors"] == 3
    )


def test_command_with_busy_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(small_tensors, "busy_cores", contextlib.nullcontext)
    done = cli("speed", "3x40", "--busy", "--rounds", 3, "-o", "sgd_sai", "--out", tmp_path)
    assert done.exit_code == 0 and "every core busy" in done.output, done.output
    assert "busy" in json.loads(speed_path(tmp_path, "3x40-busy").read_text())


def test_command_with_series(tmp_path, monkeypatch):
    few = {"same total": [(2, 8)], "same size": [(3, 8)]}
    defaults = (*small_tensors.measure_series.__defaults__[:-1], few)
    monkeypatch.setattr(small_tensors.measure_series, "__defaults__", defaults)
    done = cli("speed", "tensors", "--rounds", 3, "--out", tmp_path)
    assert done.exit_code == 0 and "same size" in done.output and speed_path(tmp_path, "tensors").exists(), done.output


def test_list_names_models_and_optimizers():
    done = cli("speed", "list")
    assert done.exit_code == 0 and "gpt2" in done.output and all(name in done.output for name in ENTRIES)


def test_threads_are_those_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert cli("speed", "2x9", "-o", "sgd_sai", "--rounds", "3", "--threads", "3").exit_code == 0 and asked == [3]


@pytest.mark.parametrize("arguments, said", [
    (["-o", "adamw-fuse"], "did you mean adamw-fused"),
    (["--reference", "sgd_fused"], "did you mean sgd-fused"),
    (["gtp2"], "did you mean gpt2"),
    (["0x5"], "write e.g. 2000x256"),
    (["tensors", "--busy"], "2000x256 --busy"),
    (["--device", "gpu"], "unknown device"),
    (["--rounds", "1"], "greater than or equal to 3"),
])  # fmt: skip
def test_wrong_input_ends_with_2_and_says_what_would_be_right(arguments, said):
    done = cli("speed", *arguments)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split()), done.output


def test_folder_that_cannot_be_written_is_said_before_measuring(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = cli("speed", "3x40", "--out", tmp_path / "file" / "x")
    assert done.exit_code == 1 and "cannot write to" in done.output


def test_absent_device_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = cli("speed", "3x40", "--device", "cuda")
    assert done.exit_code == 2 and "no CUDA device" in done.output


@pytest.mark.gpu
def test_everything_there_is_on_a_gpu():
    record = measure_speed(
        [(60, 50)] * 3,
        choose(["sgd_sai", "sgd_sai-fused", "adamw-fused", "adan", "adahessian"]),
        rounds=3,
        device="cuda",
    )
    assert (
        not record["absent"]
        and record["device"] == torch.cuda.get_device_name()
        and set(record["bandwidth"]["before"]) == {"copy", "triad", "axpy", "update"}
    )
