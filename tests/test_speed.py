"Step times: what is timed, what is counted, what a record holds, and the command line, all on tensors that are too small to measure anything."
import contextlib
import json
import os
import time
import weakref

import pytest
import torch
from typer.testing import CliRunner

import sgd_sai.speed as speed
from sgd_sai.adahessian import adahessian_reference
from sgd_sai.experiments.cli import app
from sgd_sai.experiments.cost import _own_times, cost_task, step_costs
from sgd_sai.experiments.train import MuonAdamW
from sgd_sai.speed import CONTESTANTS, Contestant, bandwidth, busy_cores, choose, measure_busy, measure_series, measure_speed, prepared
from sgd_sai.speed import quartiles, race, random_parameters, speed_notes, speed_path, speed_table, speed_targets, take_turns

SHAPES = [(7, 5), (6,), (2, 3, 3, 3)]


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def absent(name):
    "Whether a contestant needs something that is not here: a package that has to be fetched."
    if name == "authors":
        try:
            speed.authors_sgd_sai()
        except RuntimeError:
            return True
    return False


@pytest.fixture(scope="module")
def record():
    return measure_speed([(60, 50)] * 3, choose(["sgd_sai", "adamw-fused", "adamw-foreach", "authors", "po-sgdsai", "adan"]), rounds=3)


# --- contestants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, c in CONTESTANTS.items() if not c.compiled])
def test_every_contestant_steps_and_its_arrays_are_those_of_its_state(name):
    if absent(name):
        pytest.skip("the authors' package is not in the cache and cannot be fetched")
    c, params = CONTESTANTS[name], random_parameters(SHAPES)
    opt = c.build(params)
    opt.step()
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3  # another gradient, or averages would stand still
    before = [{key: value.clone() for key, value in opt.state[p].items() if torch.is_tensor(value)} for p in params]
    opt.step()
    for p, old in zip(params, before):
        full = {key for key, value in opt.state[p].items() if torch.is_tensor(value) and value.numel() == p.numel()}
        assert len(full) == len(set(c.reads) - set("pgD")), (full, c.reads)  # D is handed to AdaHessian and is no state
        changed = {key for key in full if not torch.equal(opt.state[p][key], old[key])}
        assert len(changed) == len(set(c.writes) - {"p"}), (changed, c.writes)
        widths = {opt.state[p][key].element_size() for key in full}
        assert widths <= {4, *map(int, c.widths.values())} and (not c.widths or widths == set(map(int, c.widths.values())))


def test_bytes_are_those_of_the_equations():
    found = {name: CONTESTANTS[name].bytes for name in ("sgd-plain", "sgd_sai-plain", "sgd_sai", "authors", "adamw-loop", "adan", "adahessian", "prodigy", "adam-mini")}
    assert list(found.values()) == [12, 12, 20, 20, 28, 44, 32, 48, 24]
    assert CONTESTANTS["sgd_sai-bf16"].bytes == 16 and CONTESTANTS["sgd_sai-int8"].bytes == 14 + 2 * 4 / 256


def test_adahessian_is_timed_with_the_steps_that_it_would_make():
    [p] = random_parameters([(4, 3)])
    opt = CONTESTANTS["adahessian"].build([p])
    opt.param_groups[0]["lr"] = 0.1
    before, g = p.detach().clone(), p.grad.clone()
    opt.step()
    theta = adahessian_reference(before, g, opt.given[p], {}, lr=0.1, weight_decay=0.01)
    torch.testing.assert_close(p.data, theta)


def test_usual_contestants_come_without_a_compiler():
    assert not any(c.compiled for c in choose().values())
    assert {name for name in choose(compiled=True)} - {name for name in choose()} == {"sgd_sai-compiled", "sgd-compiled"}
    with pytest.raises(KeyError):
        choose(["nobody"])


# --- measuring --------------------------------------------------------------------------------------------------------


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        super().step()


def test_twice_the_work_is_a_ratio_of_two():
    twice = Contestant("twice", "sgdm", lambda p: Twice(p, lr=1e-9, momentum=0.9, fused=True), "pgm", "pm")
    rows, missing = race(random_parameters([(500, 1000)]), {"twice": twice}, rounds=31)
    assert 1.5 < rows["twice"]["ratio"]["median"] < 2.7 and rows["sgd-fused"]["ratio"] == {"low": 1, "median": 1, "high": 1} and not missing


def test_turns_alternate_and_a_budget_ends_them():
    order = []
    take_turns(lambda: order.append("a"), lambda: order.append("b"), rounds=4)
    assert "".join(order) == "baabbaab"
    begin = time.perf_counter()
    mine, theirs = take_turns(lambda: time.sleep(0.05), lambda: None, rounds=1000, budget=0.1)
    assert 1 <= len(mine) == len(theirs) <= 4 and time.perf_counter() - begin < 2
    assert len(take_turns(lambda: time.sleep(0.02), lambda: None, budget=0.0)[0]) == 1


def test_quartiles_of_one_and_of_many():
    assert quartiles([2.0]) == {"low": 2, "median": 2, "high": 2} and quartiles([1, 2, 3, 4, 5]) == {"low": 2, "median": 3, "high": 4}


def test_bandwidth_is_positive_and_counts_what_a_copy_reads_before_it_writes():
    found = bandwidth(1 << 14, repeats=2)
    assert {kind: rate["bytes"] for kind, rate in found.items()} == {"copy": 12, "triad": 16, "axpy": 12, "update": 20, "pieces": 20}
    assert all(0 < rate["median"] <= rate["best"] for rate in found.values())


def test_parameters_and_gradients_are_the_same_on_every_call_and_leave_the_global_stream_alone():
    torch.manual_seed(5)
    one = random_parameters(SHAPES)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    for p, q in zip(one, random_parameters(SHAPES)):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad)


def test_record_is_plain_and_complete(record):
    again = json.loads(json.dumps(record))
    assert again == record
    assert (record["parameters"], record["tensors"], record["rounds"], record["reference"]) == (9000, 3, 3, "sgd-fused")
    assert record["threads"] == torch.get_num_threads() and record["torch"] == torch.__version__ and record["device"] == "cpu"
    rates = record["bandwidth"]
    assert rates["used"] == max(rate["median"] for when in ("before", "after") for rate in rates[when].values())
    for name, row in record["optimizers"].items():
        assert row["bytes"] == CONTESTANTS[name].bytes and len(row["seconds"]) == row["rounds"]
        assert row["floor_ms"] * row["times_floor"]["median"] == pytest.approx(row["ms"]["median"])
        assert row["times_floor"]["median"] * row["floor_ratio"] == pytest.approx(row["ratio"]["median"])
        for key in ("ms", "ratio", "times_floor"):
            assert 0 < row[key]["low"] <= row[key]["median"] <= row[key]["high"]
    assert set(record["first_step"]) == {"ordinary_ms", "gsnr", "with_allocation", "sgd_allocation", "rounds"}


def test_temporary_memory_is_what_a_step_allocates(record):
    parameters = 4 * record["parameters"]
    assert record["optimizers"]["sgd_sai"]["peak_bytes"] < 0.01 * parameters
    assert 0.9 * parameters < record["optimizers"]["adamw-foreach"]["peak_bytes"] < 1.5 * parameters


def test_state_of_a_contestant_is_gone_before_the_next():
    built = []

    def build(p):
        assert not any(ref() for ref in built), "the last contestant is still there"
        opt = torch.optim.SGD(p, lr=1e-9, momentum=0.9)
        built.append(weakref.ref(opt))
        return opt

    race(random_parameters(SHAPES), {str(i): Contestant(str(i), "sgdm", build, "pgm", "pm") for i in range(3)}, rounds=2)
    assert len(built) == 3


def test_what_cannot_be_measured_is_left_out_with_a_line():
    def missing(p):
        raise ImportError("No module named 'elsewhere'\nmore\nlines")

    broken = {"missing": Contestant("missing", "adan", missing, "pg", "p")}
    record = measure_speed(SHAPES, broken, rounds=2)
    assert record["absent"] == {"missing": "missing: No module named 'elsewhere'"} and list(record["optimizers"]) == ["sgd-fused"]
    assert "left out: missing: No module named 'elsewhere'" in speed_notes(record) and record["first_step"] is None


def test_compiler_that_fails_is_one_line(monkeypatch):
    def compiled(f):
        def g():
            raise ValueError("no C++ compiler\nfound")
        return g

    monkeypatch.setattr(torch, "compile", compiled)
    rows, missing = race(random_parameters(SHAPES), choose(["sgd_sai-compiled"]), rounds=2)
    assert list(rows) == ["sgd-fused"] and missing == {"sgd_sai-compiled": "SGDSaI, torch.compile: torch.compile: ValueError: no C++ compiler"}


def test_compiled_step_says_how_it_was_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)
    step, note = prepared(CONTESTANTS["sgd_sai-compiled"], random_parameters(SHAPES))
    step()
    assert note.startswith("graphs: ")


# --- series and busy cores ----------------------------------------------------------------------------------------------


def test_series_has_every_point():
    series = {"same total": [(1, 64), (4, 16)], "same size": [(2, 8)]}
    record = measure_series(choose(["sgd_sai"]), rounds=2, series=series)
    assert {name: [(p["tensors"], p["entries"]) for p in points] for name, points in record["series"].items()} == series
    assert all(set(point["optimizers"]) == {"sgd-foreach", "sgd_sai"} for points in record["series"].values() for point in points)
    assert len({n * size for n, size in speed.SERIES["same total"]}) == 1


def test_busy_cores_are_busy_and_stop():
    before = os.times()
    with busy_cores(1):
        begin = time.perf_counter()
        time.sleep(0.5)
        lasted = time.perf_counter() - begin
    after = os.times()
    assert after.children_user - before.children_user > 0.2 * lasted  # counted when they are waited for


def test_busy_record_has_both_times(monkeypatch):
    monkeypatch.setattr(speed, "busy_cores", contextlib.nullcontext)
    record = measure_busy([(16,)] * 5, choose(["sgd_sai"]), rounds=2, budget=1.0)
    assert set(record["optimizers"]) == set(record["busy"]) == {"sgd-foreach", "sgd_sai"} and json.loads(json.dumps(record)) == record


# --- figures, targets -----------------------------------------------------------------------------------------------------


def test_figures_draw(record):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    series = measure_series(choose(["sgd_sai"]), rounds=2, series={"same total": [(1, 64), (4, 16)], "same size": [(2, 8)]})
    busy = {**record, "busy": record["optimizers"]}
    costs = {"x": {"optimizers": {"sgdm": {"ms": {"median": 2.0}, "optimizer_ms": {"median": 0.5}}}}}
    figures = [speed.plot_ratios(record), speed.plot_bandwidth(record), speed.plot_models({"a": record, "b": record}), speed.plot_series(series), speed.plot_busy(busy),
               speed.plot_extras(record), speed.plot_shares(costs)]  # fmt: skip
    for figure in figures:
        figure.canvas.draw()
        assert all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.axes)
        plt.close(figure)


def test_targets_come_from_records(record):
    rows = {row["target"]: row for row in speed_targets({"gpt2": record, "busy": None})}
    assert len(rows) == len(speed.TARGETS) == 9
    optimizers = record["optimizers"]
    assert rows["SGDSaI / torch AdamW, fused"]["measured"] == pytest.approx(optimizers["sgd_sai"]["ratio"]["median"] / optimizers["adamw-fused"]["ratio"]["median"])
    assert rows["SGDSaI / its traffic floor"]["measured"] == optimizers["sgd_sai"]["times_floor"]["median"]
    busy = rows["the same while every core is busy"]
    assert busy["measured"] is None and not busy["met"]
    assert all(row["met"] == (row["measured"] <= row["limit"]) for row in rows.values() if row["measured"] is not None)


def test_table_fits_into_80_columns(record):
    console = pytest.importorskip("rich.console").Console(width=80, record=True, file=open(os.devnull, "w"))
    console.print(speed_table(record, "gpt2-medium"))
    assert "…" not in console.export_text()


# --- command line -----------------------------------------------------------------------------------------------------------


def test_command_prints_a_table_and_keeps_a_record(tmp_path):
    done = cli("speed", "3x40", "-o", "sgd_sai,adan", "--rounds", 3, "--out", tmp_path)
    assert done.exit_code == 0 and "Adan" in done.output and "floor" in done.output, done.output
    record = json.loads(speed_path(tmp_path, "3x40").read_text())
    assert list(record["optimizers"]) == ["sgd-fused", "sgd_sai", "adan"] and record["environment"]["torch"] == torch.__version__ and record["tensors"] == 3


def test_command_with_busy_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "busy_cores", contextlib.nullcontext)
    done = cli("speed", "3x40", "--busy", "--rounds", 3, "-o", "sgd_sai", "--out", tmp_path)
    assert done.exit_code == 0 and "every core busy" in done.output, done.output
    assert "busy" in json.loads(speed_path(tmp_path, "3x40-busy").read_text())


def test_command_with_series(tmp_path, monkeypatch):
    monkeypatch.setattr(speed.measure_series, "__defaults__", (*speed.measure_series.__defaults__[:-1], {"same total": [(2, 8)], "same size": [(3, 8)]}))
    done = cli("speed", "tensors", "--rounds", 3, "--out", tmp_path)
    assert done.exit_code == 0 and "same size" in done.output and speed_path(tmp_path, "tensors").exists(), done.output


def test_list_names_models_and_optimizers():
    done = cli("speed", "list")
    assert done.exit_code == 0 and "gpt2" in done.output and all(name in done.output for name in CONTESTANTS)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_device_is_one_line():
    done = cli("speed", "3x40", "--device", "cuda")
    assert done.exit_code == 1 and "no CUDA device" in done.output


# --- the whole step ---------------------------------------------------------------------------------------------------------


def test_share_of_the_optimizer_is_part_of_the_step():
    task = cost_task("digits-vit")
    cost = step_costs(task, task.load(), ["sgdm", "adan"], rounds=3, device="cpu")["optimizers"]
    assert all(0 < c["optimizer_ms"]["median"] < c["ms"]["median"] for c in cost.values())


def test_a_step_within_a_step_is_counted_once():
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
    opt = MuonAdamW(model)                                                      # whose step calls that of AdamW
    seconds = _own_times(opt, "cpu")
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        opt.step()
    assert len(seconds) == 3 and min(seconds) > 0


def test_gpt2_small_is_timed_and_no_task():
    task = cost_task("gpt2-small")
    data = task.load()
    x, y = data.train[0]
    assert len(x) == 128 and torch.equal(x[1:], y[:-1]) and data.sizes["vocab_size"] == 50257
    done = cli("cost", "gpt2-smal")
    assert done.exit_code == 2 and "did you mean gpt2-small" in " ".join(done.output.replace("│", " ").split())
    assert "gpt2-small" not in cli("tasks").output


@pytest.mark.gpu
def test_everything_there_is_on_a_gpu():
    record = measure_speed([(60, 50)] * 3, choose(["sgd_sai", "sgd_sai-fused", "adamw-fused", "adan", "adahessian"]), rounds=3, device="cuda")
    assert not record["absent"] and record["device"] == torch.cuda.get_device_name() and set(record["bandwidth"]["before"]) == {"copy", "triad", "axpy", "update"}
