"Records of g-SNR: what they hold, that their numbers obey the identity, and that figures and sentences follow them."

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sgd_sai.analysis import gsnr_records
from sgd_sai.analysis.control import (
    control_curves,
    control_frame,
    control_sentence,
    one_per_task,
    pairings,
    plot_control,
    plot_pairs,
)
from sgd_sai.analysis.gsnr_figures import first_batch, paper_frame, plot_batches, plot_means, plot_scales, plot_training
from sgd_sai.analysis.gsnr_records import (
    agreement,
    deviations,
    find_gsnr,
    gsnr_frame,
    gsnr_path,
    gsnr_record,
    gsnr_spec,
    load_gsnr,
    look_steps,
    tensor_columns,
)
from sgd_sai.cli.app import app
from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.runs import load_runs, write_json
from sgd_sai.experiments.tasks.registry import TASKS, get_task
from sgd_sai.experiments.train import train
from sgd_sai.gsnr_of_models import gsnr_table

ROOT = Path(__file__).resolve().parents[2]
RECORDS = load_gsnr(ROOT / "results")


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def obeys_the_identity(record):
    "Number of measured rows; every one has norm^2 = (n-1) std^2 + n mean^2 and G = norm / (std + eps')."
    count = 0
    for tensor in record["tensors"]:
        n = tensor["numel"]
        assert n == math.prod(tensor["shape"])
        for norm, mean, std, G, ratio in zip(
            *(tensor[key] for key in ("norm", "mean", "std", "gsnr", "ratio")), strict=True
        ):
            if norm is None:
                continue
            count += 1
            assert norm == pytest.approx(math.sqrt((n - 1) * std**2 + n * mean**2), rel=2e-5), tensor["name"]
            assert ratio == pytest.approx(G / math.sqrt(n), rel=1.2e-5)
            if n == 1 or norm == 0:
                assert G == (1 if norm else 0)
                continue
            G_of_it = norm / (std + min(1e-8, 1e-3 * norm / math.sqrt(n)))
            assert G == pytest.approx(G_of_it, rel=2e-5), tensor["name"]
            if std > 1e-2 * norm / math.sqrt(n) and norm / math.sqrt(n) > 1e-3:  # without eps the identity itself
                assert G**2 == pytest.approx((n - 1) + n * (mean / std) ** 2, rel=1e-4)
    return count


@pytest.fixture(scope="module")
def small():
    task = get_task("digits-vit")
    return gsnr_record(task, task.load(), steps=5, batch_count=3, weight_count=2, device="cpu")


# --- records --------------------------------------------------------------------------------------


def test_a_record_says_what_was_measured_and_how(small):
    task = get_task("digits-vit")
    assert {key: small[key] for key in ("format", "model", "batch_count", "weight_count", "spec")} == gsnr_spec(
        task, task.load(), 5, batch_count=3, weight_count=2
    )
    assert small["spec"]["optimizer"] == "sgd_sai" and small["steps"] == [1, 2, 4, 5] and small["status"] == "finished"
    assert small["environment"]["torch"] == torch.__version__ and set(small["final"]) == {"val_loss", "accuracy"}
    model = task.build({})
    assert {t["name"]: tuple(t["shape"]) for t in small["tensors"]} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    for tensor in small["tensors"]:
        assert set(tensor) == {
            "name",
            "kind",
            "shape",
            "numel",
            "norm",
            "mean",
            "std",
            "gsnr",
            "ratio",
            "batches",
            "weights",
        }
        assert all(len(tensor[key]) == 4 for key in ("norm", "mean", "std", "gsnr", "ratio")) and (
            len(tensor["batches"]),
            len(tensor["weights"]),
        ) == (3, 2)
        assert all(x == float(f"{x:.6g}") for x in tensor["norm"] + tensor["batches"])
        # one batch and one draw of weights, measured three times
        assert tensor["batches"][0] == tensor["weights"][0] == pytest.approx(tensor["gsnr"][0], rel=1e-4)
    assert obeys_the_identity(small) == 4 * len(small["tensors"])


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 9, 240])
def test_looks_at_powers_of_two_and_the_end(steps):
    looked = look_steps(steps)
    assert (
        looked[0] == 1
        and looked[-1] == steps
        and looked == sorted(set(looked))
        and all(x & (x - 1) == 0 for x in looked[:-1])
    )


def test_gradients_are_seen_before_they_are_clipped():
    task, norms = get_task("digits-vit"), []
    data = task.load()
    train(
        task,
        data,
        make_spec(task, data, "sgd_sai", steps=3),
        "cpu",
        on_gradients=lambda step, model: norms.append(
            (step, nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        ),
    )
    assert [step for step, _ in norms] == [1, 2, 3] and norms[0][1] > task.clip * 1.5


def test_tensors_that_get_no_gradient_at_some_step_are_kept_apart():
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    net = nn.Sequential(first, second)
    second(torch.randn(4, 2)).sum().backward()
    early = gsnr_table(net)
    net(torch.randn(4, 3)).square().sum().backward()
    columns = {t["name"]: t for t in tensor_columns({1: early, 2: gsnr_table(net)})}
    assert (
        columns["0.weight"]["gsnr"][0] is None
        and columns["0.weight"]["gsnr"][1] > 0
        and None not in columns["1.weight"]["gsnr"]
    )
    frame = gsnr_frame({"tensors": list(columns.values()), "steps": [1, 2]})
    assert frame.ratio.isna().sum() == 2 and len(frame) == 8


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_committed_records_obey_the_identity(name):
    record = RECORDS[name]
    assert obeys_the_identity(record) > 0
    parts = gsnr_frame(record).dropna(subset="ratio")
    assert np.allclose(np.log(parts.ratio), parts.few + parts.common + parts.epsilon, atol=2e-5)
    assert (
        parts.ratio >= np.sqrt((parts.numel - 1) / parts.numel) * np.exp(parts.epsilon) - 1e-5
    ).all()  # G >= sqrt(n-1)
    if "spec" in record:
        assert (
            record["model"] == name
            and name in TASKS
            and record["steps"] == look_steps(record["spec"]["steps"])
            and record["status"] == "finished"
        )


def test_committed_records_are_small_and_not_taken_for_runs():
    files = list((ROOT / "results" / "gsnr").glob("*.json"))
    assert files and max(f.stat().st_size for f in files) < 300_000
    assert load_runs(ROOT / "results", "gsnr") == []


# --- files ----------------------------------------------------------------------------------------


def test_interruption_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    command = ["gsnr", "digits-vit", "--steps", 4, "--batches", 1, "--weights", 1, "--device", "cpu", "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(gsnr_records, "train", interrupted)
        done = cli(*command)
        assert done.exit_code == 130 and "Traceback" not in done.output
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)  # while the file is being put in its place
        assert cli(*command).exit_code == 130
    assert load_gsnr(tmp_path) == {} and not gsnr_path(tmp_path, "digits-vit").exists()
    done = cli(*command)
    assert done.exit_code == 0 and set(load_gsnr(tmp_path)) == {"digits-vit"}
    when = gsnr_path(tmp_path, "digits-vit").stat().st_mtime_ns
    again = cli(*command, "--plot", tmp_path / "figure.png")
    assert (
        again.exit_code == 0
        and "found" in again.output
        and gsnr_path(tmp_path, "digits-vit").stat().st_mtime_ns == when
        and (tmp_path / "figure.png").stat().st_size > 5000
    )
    record = load_gsnr(tmp_path)["digits-vit"]
    assert cli(*command, "--fresh").exit_code == 0
    assert (
        load_gsnr(tmp_path)["digits-vit"]["tensors"] == record["tensors"]
    )  # the same run, to the last digit that is kept


def test_a_record_of_something_else_or_one_that_is_broken_is_made_again(tmp_path, small):
    task = get_task("digits-vit")
    given = gsnr_spec(task, task.load(), 5, batch_count=3, weight_count=2)
    path = write_json(gsnr_path(tmp_path, "digits-vit"), small)
    assert (
        find_gsnr(tmp_path, given) == small
        and find_gsnr(tmp_path, given | {"batch_count": 4}) is None
        and find_gsnr(tmp_path, given | {"format": 0}) is None
    )
    path.write_text(path.read_text()[:1000])
    with pytest.warns(UserWarning, match="not a readable record"):
        assert find_gsnr(tmp_path, given) is None
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match="sgd-sai gsnr digits-vit --out"):
        load_gsnr(tmp_path, ["digits-vit"])


@pytest.mark.parametrize("arguments, said", [
    (["digit-vit"], "did you mean digits-vit"),
    (["ful-size", "--out", "x"], "did you mean full-size"),
    (["digits-vit", "--steps", "0", "--out", "x"], "--steps"),
    (["digits-vit", "--steps", "five", "--out", "x"], "--steps"),
    (["digits-vit", "--steps", "5"], "--out"),
    (["full-size"], "--out"),
    (["full-size", "--steps", "5", "--out", "x"], "not trained"),
    (["digits-vit", "--batches", "0", "--out", "x"], "--batches"),
    (["digits-vit", "--device", "tpu", "--out", "x"], "unknown device"),
])  # fmt: skip
def test_wrong_arguments_are_said_before_anything_is_trained(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("gsnr", *arguments)
    words = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2 and said in words and "Traceback" not in words, done.output
    assert not list(tmp_path.iterdir())


# --- figures and tables ---------------------------------------------------------------------------


def fabricated(common=0.0, steps=(1, 2), name="made-up"):
    "A record of six tensors of known statistics; `common` is mean over standard deviation of the norm gains."
    kinds = {
        "conv": (8, 4, 3, 3),
        "linear": (30, 20),
        "embedding": (50, 8),
        "norm": (16,),
        "bias": (12,),
        "other": (1,),
    }
    tensors = []
    for i, (kind, shape) in enumerate(kinds.items()):
        n, std, mean = math.prod(shape), 0.5, 0.5 * common * (kind == "norm")
        norm = math.sqrt((n - 1) * std**2 + n * mean**2) if n > 1 else 0.5
        G = norm / (std + 1e-8) if n > 1 else 1.0
        numbers = dict(
            norm=norm, mean=mean if n > 1 else 0.5, std=std if n > 1 else 0.0, gsnr=G, ratio=G / math.sqrt(n)
        )
        tensor = {"name": f"layer.{kind}", "kind": kind, "shape": list(shape), "numel": n}
        tensor |= {key: [value] * len(steps) for key, value in numbers.items()}
        draws = {"batches": [G * (1 + 1e-3 * (i + j)) for j in range(3)], "weights": [G, G * 1.01]}
        tensors.append(tensor | draws)
    return {
        "format": 1,
        "model": name,
        "title": name,
        "batch_count": 3,
        "weight_count": 2,
        "steps": list(steps),
        "tensors": tensors,
    }


def drawn(fig):
    "Every point of a figure, and its texts."
    points = [
        np.asarray(xy, float).round(9).tolist()
        for ax in fig.axes
        for artist in [*ax.collections, *ax.lines]
        for xy in [artist.get_offsets() if hasattr(artist, "get_offsets") else artist.get_xydata()]
    ]
    bands = [
        path.vertices.round(9).tolist() for ax in fig.axes for artist in ax.collections for path in artist.get_paths()
    ]
    return json.dumps([points, bands, [ax.get_title(loc="left") for ax in fig.axes]])


@pytest.mark.parametrize("plot", [plot_scales, plot_training, plot_means])
def test_figures_follow_the_record(plot):
    one, other = {"a": fabricated()}, {"a": fabricated(common=0.7)}
    assert drawn(plot(one)) == drawn(plot({"a": fabricated()})) != drawn(plot(other))
    assert len(plot({**one, "b": fabricated(name="b")}).axes) >= 2


def test_figure_of_batches_follows_the_record():
    other = fabricated()
    other["tensors"][0]["batches"][2] *= 1.5
    assert drawn(plot_batches({"a": fabricated()})) != drawn(plot_batches({"a": other}))


def test_figures_of_nothing_say_so():
    with pytest.raises(ValueError, match="no record"):
        plot_training({"a": fabricated(steps=(1,))})
    with pytest.raises(ValueError, match="no record"):
        plot_batches({"a": fabricated() | {"batch_count": 1}})


def test_deviations_name_the_reason_and_agreement_counts():
    record = fabricated(common=0.7)
    table = deviations({"a": record}, 6)
    assert list(table.tensor[:2]) == ["layer.norm", "layer.bias"] and list(table.reason[:2]) == [
        "common mean",
        "few entries",
    ]
    assert table.iloc[0]["common mean (%)"] == pytest.approx(100 * (math.sqrt(1 + 16 / 15 * 0.49) - 1)) and table.iloc[
        1
    ]["few entries (%)"] == pytest.approx(100 * (math.sqrt(11 / 12) - 1))
    frame = agreement({"a": record}, within=0.01)
    n = {t["kind"]: t["numel"] for t in record["tensors"]}
    assert frame.loc[("a", "all"), "parameters near, step 1"] == pytest.approx(
        1 - (n["norm"] + n["bias"]) / sum(n.values())
    )
    assert (
        frame.loc[("a", "norm"), "most"] == pytest.approx(table.iloc[0]["G/√n"])
        and frame.loc[("a", "all"), "tensors"] == 6
    )


def test_a_tiny_gradient_is_told_from_a_common_mean():
    record, n = fabricated(), 12
    tensor = record["tensors"][4]
    tensor["std"], tensor["norm"], G = (
        [1e-12] * 2,
        [math.sqrt(n - 1) * 1e-12] * 2,
        math.sqrt(n - 1) / (1 + 1e-3 * math.sqrt((n - 1) / n)),
    )
    tensor["gsnr"], tensor["ratio"] = [G] * 2, [G / math.sqrt(n)] * 2
    row = deviations({"a": record}, 1).iloc[0]
    assert (
        row.tensor == "layer.bias" and row["ε (%)"] == pytest.approx(-0.0957, abs=1e-3) and row["few entries (%)"] < -4
    )


def test_the_first_batch_is_told_apart():
    record = fabricated(common=0.5)
    table = first_batch({"a": record})
    assert table.loc[("a", "all"), "tensors"] == 5  # the one with one entry has no say
    assert table.loc[("a", "linear"), "batches: spread of G (%)"] == pytest.approx(0.1, rel=0.02)
    assert table.loc[("a", "linear"), "weights: spread of G (%)"] == pytest.approx(
        100 * np.std([1, 1.01], ddof=1) / 1.005, rel=1e-3
    )
    assert table.loc[("a", "all"), "batches: correlation"] == pytest.approx(1) and math.isnan(
        table.loc[("a", "linear"), "batches: correlation"]
    )
    assert len(first_batch({"a": record | {"batch_count": 1}})) == 0


def test_the_papers_values_are_square_roots():
    if "vit_s16" not in RECORDS:
        pytest.skip("no record at full size")
    frame = paper_frame(RECORDS["vit_s16"])
    assert list(frame.tensors) == [12, 12, 12, 1] and (abs(frame["plotted / √n"] - 1) < 1e-3).all()
    assert ((frame["G here, least"] / frame["√n"] - 1).abs() < 0.01).all() and (
        (frame["G here, most"] / frame["√n"] - 1).abs() < 0.01
    ).all()


# --- the control ----------------------------------------------------------------------------------


def a_task(name):
    return replace(get_task("shakespeare-gpt"), name=name)


def run(optimizer, seed, final, **changes):
    history = [{"step": s, "val_loss": final + (100 - s) / 100} for s in (0, 50, 100)]
    setting = dict(steps=100, batch_size=8, warmup=0, clip=None, precision="no", data="")
    record = dict(task="t", optimizer=optimizer, hyperparameters={"lr": 0.1, "weight_decay": 0.0}, seed=seed)
    return record | setting | dict(status="finished", history=history, final={"val_loss": final}) | changes


def test_only_runs_that_share_everything_else_are_pairs():
    runs = (
        [run("sgd_sai", s, 1.0) for s in range(4)]
        + [run("sgd_sai_sqrtn", s, 1.1) for s in range(3)]
        + [run("adamw", 0, 1.0)]
    )
    runs += [
        run("sgd_sai_sqrtn", 3, 9.9, status="diverged"),
        run("sgd_sai_sqrtn", 3, 1.0, steps=99),
        run("sgd_sai_sqrtn", 3, 1.0, precision="bf16"),
    ]
    runs += [
        run("sgd_sai", 0, 1.0, hyperparameters={"lr": 0.2}),
        run("sgd_sai_sqrtn", 0, 1.0, hyperparameters={"lr": 0.2}),
    ]
    assert [sorted(p.runs["sgd_sai"]) for p in pairings(runs)] == [[0, 1, 2], [0]] and len(pairings(runs, seeds=2)) == 1
    assert [p.hyperparameters["lr"] for p in one_per_task(pairings(runs), a_task)] == [
        0.2
    ]  # which ends at 1.0 with both scales


def test_the_sentence_follows_the_numbers():
    seeds, gaps = (1.0, 1.1, 1.2), (0.01, 0.012, 0.008)
    pairs = pairings(
        [run("sgd_sai", s, v) for s, v in enumerate(seeds)]
        + [run("sgd_sai_sqrtn", s, v + g) for s, (v, g) in enumerate(zip(seeds, gaps, strict=True))],
        2,
    )
    row = control_frame(pairs, a_task).iloc[0]
    half = 4.302653 * 0.002 / math.sqrt(3)
    assert (row.difference, row.low, row.high) == tuple(
        pytest.approx(x, abs=1e-6) for x in (0.01, 0.01 - half, 0.01 + half)
    )
    assert (
        row["wider than seeds"] == 0
        and row.evaluations == 2
        and row["std over seeds"] == pytest.approx(0.099, abs=2e-3)
    )
    assert (
        "+0.0100 nats from SGD-SaI" in control_sentence(row, a_task("t"))
        and "smaller than" in control_sentence(row, a_task("t"))
        and "does not contain 0" in control_sentence(row, a_task("t"))
    )
    wide = pairings(
        [run("sgd_sai", s, 1.0 + 0.01 * s) for s in range(3)]
        + [run("sgd_sai_sqrtn", s, 1.5 - 0.01 * s) for s in range(3)],
        2,
    )
    other = control_frame(wide, a_task).iloc[0]
    assert "larger than" in control_sentence(other, a_task("t")) and other["wider than seeds"] == 2
    assert drawn(plot_control(pairs, a_task)) != drawn(plot_control(wide, a_task)) and drawn(
        plot_pairs(pairs, a_task)
    ) != drawn(plot_pairs(wide, a_task))
    assert list(control_curves(pairs[0], "val_loss").step) == [50, 100]
