"Packed runs: nothing is lost on the way, whatever else happens in the folder."

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from run_files import outcome
from typer.testing import CliRunner

import sgd_sai.experiments.pack as packing
from sgd_sai.cli.app import app
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.pack import pack, pack_runs, unpack, unpack_runs
from sgd_sai.experiments.repeat import repeat_run
from sgd_sai.experiments.runs import (
    RunSpec,
    load_run,
    load_runs,
    packed_parts,
    packed_path,
    read_run,
    run_lock,
    run_path,
    save_run,
    spec_of,
)
from sgd_sai.experiments.spread import paired_differences, spread
from sgd_sai.experiments.sweep import Sweep, run_sweep

RESULTS = Path(__file__).resolve().parents[2] / "results"
SPEC = RunSpec("digits-vit", "adamw", {"lr": 0.003}, 0, 240, 64, 24, 1.0, "no", "0" * 12)
SPECS = [replace(SPEC, seed=seed) for seed in range(3)]


def saved(folder, specs=SPECS):
    "The texts of run files with numbers that need all their digits."
    paths = [save_run(folder, spec, outcome((spec.seed + 1) / 3, empty=None)) for spec in specs]
    return {path: path.read_text() for path in paths}


# --- the records of this repository -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_packed_results_are_sorted_whole_and_of_a_size_that_can_be_opened(path):
    text = path.read_text()
    runs = unpack(text)
    assert pack(runs[::-1]) == text and path.stat().st_size < 2_000_000
    task = path.stem.partition("+")[0]  # of further parts too
    assert all((run["task"], run["key"]) == (task, spec_of(run).key) for run in runs)
    assert len({run["key"] for run in runs}) == len(runs)
    assert f"| `{path.name}` | {len(runs)} |" in (RESULTS / "README.md").read_text()


def test_results_are_packed_and_their_columns_explained():
    assert len(load_runs(RESULTS)) == sum(len(path.read_text().splitlines()) for path in RESULTS.glob("*.jsonl"))
    columns = {column for run in load_runs(RESULTS) for column in run}
    words = (RESULTS / "README.md").read_text()
    assert not [column for column in columns if f"`{column}`" not in words]


# --- there and back ---------------------------------------------------------------------------------------------------


def test_files_come_back_byte_for_byte(tmp_path):
    files = saved(tmp_path)
    before = load_runs(tmp_path)
    assert pack_runs(tmp_path) == [packed_path(tmp_path, "digits-vit")] and not any(path.exists() for path in files)
    assert load_runs(tmp_path) == before and [load_run(tmp_path, spec)["seed"] for spec in SPECS] == [0, 1, 2]
    assert pack_runs(tmp_path) == []  # there is nothing left to do
    assert set(unpack_runs(tmp_path)) == set(files) and {path: path.read_text() for path in files} == files
    assert [path.name for path in tmp_path.iterdir()] == ["digits-vit"]


def test_many_runs_go_into_several_files(tmp_path, monkeypatch):
    "Of two lines each; what is added later moves lines to later files, and no reader sees where a run is."
    files, before = saved(tmp_path), load_runs(tmp_path)
    longest = max(len(line) for line in pack(before).splitlines(keepends=True))
    monkeypatch.setattr(packing, "PART_BYTES", 2 * longest)
    names = ["digits-vit.jsonl", "digits-vit+2.jsonl"]
    assert [path.name for path in pack_runs(tmp_path)] == names
    assert [len((tmp_path / name).read_text().splitlines()) for name in names] == [2, 1]
    for spec in SPECS:
        assert load_run(tmp_path, spec) == read_run(f"{tmp_path}/digits-vit.jsonl#{spec.key}")
    assert load_runs(tmp_path) == load_runs(tmp_path, "digits-vit") == before
    more = saved(tmp_path, [replace(spec, optimizer="sgdm") for spec in SPECS])
    assert [path.name for path in pack_runs(tmp_path)] == [*names, "digits-vit+3.jsonl"]
    assert len(load_runs(tmp_path)) == 6 and all(load_run(tmp_path, spec) for spec in SPECS)
    assert set(unpack_runs(tmp_path)) == {*files, *more}
    assert [path.name for path in tmp_path.iterdir()] == ["digits-vit"]


@pytest.mark.parametrize("size,parts", [(1, 6), (1_700, 3), (10**6, 1)])
@pytest.mark.parametrize("added", ["adam", "sgdm"])
def test_writing_parts_never_loses_a_line(tmp_path, monkeypatch, size, parts, added):
    "Killed after any file was written, every run is still in one of them."
    saved(tmp_path)
    monkeypatch.setattr(packing, "PART_BYTES", 1)
    pack_runs(tmp_path)
    saved(tmp_path, [replace(spec, optimizer=added) for spec in SPECS])
    write_text, seen = packing.write_text, []

    def write_and_look(path, text):
        write_text(path, text)
        seen.append({run["key"] for run in load_runs(tmp_path)} >= {spec.key for spec in SPECS})
        return path

    monkeypatch.setattr(packing, "write_text", write_and_look)
    monkeypatch.setattr(packing, "PART_BYTES", size)
    assert len(pack_runs(tmp_path)) == len(packed_parts(packed_path(tmp_path, "digits-vit"))) == parts
    assert seen and all(seen) and len(load_runs(tmp_path)) == 6


def test_a_file_of_its_own_counts_before_a_line_and_replaces_it(tmp_path):
    saved(tmp_path)
    pack_runs(tmp_path)
    save_run(tmp_path, SPEC, outcome(0.125))
    assert (
        load_run(tmp_path, SPEC)["final"]["val_loss"] == 0.125
        and [run["final"]["val_loss"] for run in load_runs(tmp_path)].count(0.125) == 1
    )
    for place in (run_path(tmp_path, SPEC), f"{tmp_path}/digits-vit.jsonl#{SPEC.key}"):
        assert read_run(place)["final"]["val_loss"] == 0.125
    pack_runs(tmp_path)
    assert load_run(tmp_path, SPEC)["final"]["val_loss"] == 0.125 and len(load_runs(tmp_path)) == 3


def test_a_file_that_cannot_be_read_does_not_hide_its_line(tmp_path):
    saved(tmp_path)
    pack_runs(tmp_path)
    path = run_path(tmp_path, SPEC)
    path.parent.mkdir()
    path.write_text('{"schema": 1, "key": ')
    with pytest.warns(UserWarning, match="not a readable run file"):
        assert load_run(tmp_path, SPEC)["seed"] == 0
    with pytest.warns(UserWarning, match="not a readable run file"):
        assert pack_runs(tmp_path) == [] and path.exists()


def test_other_records_stay_where_they_are(tmp_path):
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "gpt2.json").write_text('{"parameters": 1}\n')
    saved(tmp_path)
    assert [path.name for path in pack_runs(tmp_path)] == ["digits-vit.jsonl"]
    assert (tmp_path / "speed" / "gpt2.json").exists()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_claimed_run_and_one_that_changes_meanwhile_stay_files(tmp_path, monkeypatch):
    saved(tmp_path)
    write = packing.write_text

    def slow(path, text):
        save_run(tmp_path, SPECS[1], outcome(0.125))  # by another process, after this one has read it
        return write(path, text)

    monkeypatch.setattr(packing, "write_text", slow)
    with run_lock(tmp_path, SPECS[0]):
        pack_runs(tmp_path)
    left = {path.stem for path in tmp_path.glob("digits-vit/*.json")}
    assert left == {SPECS[0].key, SPECS[1].key} and load_run(tmp_path, SPECS[1])["final"]["val_loss"] == 0.125


def test_a_pack_that_is_killed_loses_and_doubles_nothing(tmp_path, monkeypatch):
    saved(tmp_path)
    before = load_runs(tmp_path)
    for name in ("write_text", "_remove_packed"):  # before and after the packed file is written
        with monkeypatch.context() as patched:
            patched.setattr(packing, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pack_runs(tmp_path)
        assert load_runs(tmp_path) == before
    pack_runs(tmp_path)
    assert load_runs(tmp_path) == before and not list(tmp_path.glob("*/*.json"))


@pytest.mark.parametrize("line", ["{", "[]", '{"schema": 1}'])
def test_a_broken_line_is_refused_before_anything_changes(tmp_path, line):
    saved(tmp_path)
    pack_runs(tmp_path)
    packed = packed_path(tmp_path, "digits-vit")
    packed.write_text(packed.read_text() + line + "\n")
    save_run(tmp_path, replace(SPEC, seed=9), outcome())
    text = packed.read_text()
    for change in (pack_runs, unpack_runs):
        with pytest.raises(UsageError, match="a line that is no run"):
            change(tmp_path)
        assert packed.read_text() == text and [path.stem for path in tmp_path.glob("*/*.json")] == [
            replace(SPEC, seed=9).key
        ]


@pytest.mark.parametrize("place, said", [
    ("digits-vit.jsonl", "has 3 runs: say which one"),
    ("digits-vit.jsonl#0123", "has no run 0123"),
    ("other.json", "is no run file"),
])  # fmt: skip
def test_names_of_no_run(tmp_path, place, said):
    saved(tmp_path)
    pack_runs(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match=said):
        read_run(tmp_path / place)
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "none.jsonl#0123")
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "digits-vit" / "0123.json")


# --- used -------------------------------------------------------------------------------------------------------------


def test_a_sweep_goes_on_from_packed_runs_and_a_packed_run_is_repeated(tmp_path):
    sweep = Sweep("digits-vit", ["sgd_sai"], seeds=2, steps=3)
    first = run_sweep(sweep, tmp_path, device="cpu")
    pack_runs(tmp_path)
    again = run_sweep(sweep, tmp_path, device="cpu")
    assert again["trained"] == 0 and again["runs"] == first["runs"]
    place = f"{tmp_path}/digits-vit.jsonl#{first['runs'][0]['key']}"
    old, new = repeat_run(place, device="cpu")
    assert old == first["runs"][0] and old["final"] == new["final"]
    done = CliRunner().invoke(app, ["repeat", place, "--device", "cpu"])
    assert done.exit_code == 0, done.output


def test_runs_of_another_format_are_none(tmp_path):
    path = packed_path(tmp_path, "digits-vit")
    path.write_text(json.dumps({"schema": 0, "key": SPEC.key, **asdict(SPEC)}) + "\n")
    with pytest.warns(UserWarning, match="its schema is 0, not 1"):
        assert load_run(tmp_path, SPEC) is None and load_runs(tmp_path) == []


# --- spread -----------------------------------------------------------------------------------------------------------


def test_spread_is_the_sample_deviation_of_differences_by_seed():
    first, second = {0: 0.90, 1: 0.94, 2: 0.91}, {2: 0.93, 1: 0.95, 0: 0.91, 3: 0.5}
    gaps = spread(paired_differences(first, second))
    assert gaps.n == 3 and f"{gaps.scaled(100):+.2f}" == "-1.33 ± 0.58"
    assert gaps.standard_error == pytest.approx(gaps.std / 3**0.5)
    assert f"{spread([0.5]):.1f}" == "0.5"
