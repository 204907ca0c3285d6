"Memory: shapes of models, rules against real optimizers, the CUDA allocator by hand, and a training step in a process of its own."
import json
import random
import types
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

import sgd_sai.experiments.memory as measuring
import sgd_sai.shapes as shapes_module
from sgd_sai.experiments.cli import app
from sgd_sai.experiments.memory import MODEL, process_memory, step_memory, step_memory_path, step_memory_table
from sgd_sai.memory import (MIB, PAPER, PAPER_MODELS, SHOWN, STATES, _size, cuda_memory, lbfgs_rule, memory_table, paper_table, real_state, state_buffers,
                            state_bytes, state_rule, state_size)
from sgd_sai.shapes import SHAPES, meta_model, model_shapes, named_shapes

ODD = {"scalar": (), "one": (1,), "bias": (5,), "weight": (7, 3), "row": (1, 4), "conv1d": (2, 3, 5), "conv": (4, 3, 3, 3), "long": (300,)}
EMBEDDED = {"embed_tokens.weight": (6, 4), "layers.0.q_proj.weight": (512, 256), "layers.0.attn.qkv.weight": (96, 3), "lm_head.weight": (6, 4)}


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], terminal_width=100)


def total(names):
    return sum(s.numel() for s in model_shapes(names))


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200),
                                         ("llama2-7b", 6_738_415_616), ("vit_s16", 22_050_664), ("vit_h14", 632_045_800), ("resnet18", 11_689_512),
                                         ("resnet50", 25_557_032)])
def test_parameters_of_named_models(name, count):
    assert name in SHAPES and total(name) == count


@pytest.mark.parametrize("name, count", [("convnext_tiny", 28_589_128), ("regnet_y_16gf", 83_590_140), ("inception_v3", 27_161_264), ("bert", 109_482_240),
                                         ("t5", 60_506_624)])
def test_parameters_of_models_of_the_libraries(name, count):
    model = meta_model(name)
    assert sum(p.numel() for p in model.parameters()) == count and all(p.is_meta for p in model.parameters())


def test_classifiers_of_torchvision_can_be_built_without_a_warning(recwarn):
    names = shapes_module._torchvision_names()
    assert len(names) >= 80
    for name in {*names[::4], "googlenet", "inception_v3", "regnet_x_400mf"}:
        assert total(name) > 1e5, name
    assert not [w for w in recwarn if "initialization" in str(w.message)]


def test_nothing_is_allocated():
    meta_model("gpt2")  # imports transformers
    before = process_memory()[0]
    model = meta_model("llama2-7b")
    assert process_memory()[0] - before < 100e6 < 4 * sum(p.numel() for p in model.parameters())


def test_a_folder_with_a_configuration_is_a_model(tmp_path):
    (tmp_path / "tiny").mkdir()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 10, "n_positions": 4}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    shapes = named_shapes(str(tmp_path / "tiny"))
    assert shapes["transformer.wte.weight"] == (10, 8) and "lm_head.weight" not in shapes  # shared with the embedding


def test_a_hub_id_that_cannot_be_had_is_an_error_of_the_system(monkeypatch):
    from transformers import AutoConfig

    def offline(*args, **kwargs):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(OSError, match=r"'somebody/something'.*no network$"):
        model_shapes("somebody/something")
    done = cli("memory", "somebody/something")
    assert done.exit_code == 1 and "somebody/something" in done.output


def test_unknown_models_are_answered_with_the_nearest():
    for wrong, near in (("vit_s61", "vit_s16"), ("resnet51", "resnet50"), ("lama2-7b", "llama2-7b")):
        with pytest.raises(KeyError, match=f"did you mean {near}"):
            model_shapes(wrong)


# --- rules ----------------------------------------------------------------------------------------------------------


def kept(opts):
    "Bytes of the state by key."
    found = Counter()
    for opt in opts:
        for state in opt.state.values():
            for key, value in state.items():
                found[key] += _size(value)
    return {key: n for key, n in found.items() if n}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", STATES)
def test_rule_is_what_the_real_optimizer_keeps(name, dtype):
    ruled = Counter()
    for buffer in state_buffers(name, ODD, dtype):
        ruled[buffer.key] += buffer.bytes
    opts = real_state(name, ODD, dtype)
    assert kept(opts) == {key: n for key, n in ruled.items() if n}
    assert sum(map(state_bytes, opts)) == state_size(name, ODD, dtype)


@pytest.mark.parametrize("name", STATES)
def test_what_is_on_the_device_are_the_tensors_beside_the_parameters(name):
    opts = real_state(name, {"weight": (7, 3), "bias": (5,)})
    for b in {b.key: b for b in state_buffers(name, {"weight": (7, 3), "bias": (5,)})}.values():
        values = [state[b.key] for opt in opts for state in opt.state.values() if b.key in state]
        if b.on_device:
            assert all(isinstance(v, (torch.Tensor, list)) for v in values)
        else:  # numbers, and clocks that torch keeps on the CPU
            assert all(not isinstance(v, torch.Tensor) or (v.ndim == 0 and v.dtype == torch.float32) for v in values)


@pytest.mark.filterwarnings("ignore")
def test_adam_mini_by_names():
    opts = real_state("po:AdamMini", EMBEDDED)
    assert sum(map(state_bytes, opts)) == state_size("po:AdamMini", EMBEDDED)


def test_lbfgs_with_its_default_history():
    assert sum(b.bytes for b in lbfgs_rule(100)({"w": (1000,)}, torch.float32)) == 4 * (202 * 1000 + 201) + 32


def test_rules_scale_with_the_model():
    shapes = named_shapes("gpt2")
    n, tensors = sum(s.numel() for s in shapes.values()), len(shapes)
    assert state_size("sgd_sai", shapes) == 4 * n + 8 * tensors == state_size("sgd_sai_sqrtn", shapes)
    assert state_size("sgd_sai", list(shapes.values()), torch.bfloat16) == 2 * n + 8 * tensors
    assert state_size("sgd_sai_kahan", shapes) == 4 * n + 8 * tensors and state_size("sgd_sai_kahan", shapes, torch.bfloat16) == 4 * n + 8 * tensors
    assert state_size("adamw", shapes) == 8 * n + 4 * tensors and state_size("adan", shapes) == 16 * n + 4 * tensors
    assert 1 < state_size("sgd_sai_int8", shapes) / n < 1.02
    assert state_size("sgd_sai_bf16", shapes) - 8 * tensors == 2 * n + 8 * tensors == state_size("sgd_sai_bf16", shapes, torch.bfloat16)
    assert state_size("adafactor", shapes) < 0.02 * n


def test_unknown_optimizer_is_answered_with_the_nearest():
    with pytest.raises(KeyError, match="did you mean adan"):
        state_rule("adam_n")


# --- tables -----------------------------------------------------------------------------------------------------------


def test_table_prints_shows_converts_and_plots():
    table = memory_table(["resnet18", "vit_s16"], ["sgd_sai", "adamw"], torch.bfloat16)
    assert [(row.model, row.optimizer) for row in table] == [(m, o) for m in ("resnet18", "vit_s16") for o in ("sgd_sai", "adamw")]
    lines = repr(table).splitlines()
    assert lines[1].split() == ["GB", "GiB"] * 2 and lines[2].startswith("(the weights)") and f"{2 * 11_689_512 / 1e9:.3f}" in lines[2]
    assert table._repr_html_().count("<tr>") == 5
    frame = table.to_pandas()
    assert frame.weight_bytes.tolist() == [2 * 11_689_512] * 2 + [2 * 22_050_664] * 2 and list(frame.state_bytes) == [row.state_bytes for row in table]
    assert "resnet18" in table.plot("resnet18").axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="gpt2"):
        table.plot("gpt2")


def test_default_table_fits_into_100_columns():
    assert max(map(len, repr(memory_table()).splitlines())) <= 100
    assert set(PAPER_MODELS) <= set(SHAPES) and set(SHOWN) <= set(STATES)


def test_paper_cells():
    rows = {(row.model, row.optimizer): row for row in paper_table()}
    assert rows.keys() == PAPER.keys()
    for key, row in rows.items():
        printed, ours = PAPER[key], row.cuda / 2**30
        assert abs(ours / printed - 1) < 0.02 or f"{ours:.2f}" == f"{printed:.2f}", key


# --- CUDA's allocator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, allocated, reserved", [
    ([], 0, 0), ([0], 0, 0), ([1], 512, 2 * MIB), ([512], 512, 2 * MIB), ([513], 1024, 2 * MIB),
    ([MIB, MIB], 2 * MIB, 2 * MIB), ([MIB, MIB, 1], 2 * MIB + 512, 4 * MIB),
    ([MIB + 1], MIB + 512, 20 * MIB), ([2 * MIB] * 10, 20 * MIB, 20 * MIB), ([6 * MIB] * 3, 18 * MIB, 20 * MIB),
    ([19 * MIB // 2] * 2, 20 * MIB, 20 * MIB),  # 1 MiB would be left after the second: it gets 10.5
    ([10 * MIB], 10 * MIB, 10 * MIB), ([10 * MIB + 1], 10 * MIB + 512, 12 * MIB), ([11 * MIB], 12 * MIB, 12 * MIB), ([25 * MIB], 26 * MIB, 26 * MIB),
    ([12 * MIB - 3 * MIB // 2, 3 * MIB // 2], 12 * MIB, 12 * MIB),  # the rest of a segment serves the next
    ([18 * MIB - 3 * MIB // 2, 8 * MIB, 3 * MIB // 2], 26 * MIB, 38 * MIB),  # and the smallest that fits is taken
    ([MIB, 700_000, 300_000], MIB + 700_416 + 300_032, 2 * MIB),
])
def test_allocator_by_hand(sizes, allocated, reserved):
    assert cuda_memory(sizes) == (allocated, reserved)


def test_allocator_never_gives_less_than_is_asked_for_nor_more_than_it_has():
    draw = random.Random(0)
    for _ in range(50):
        sizes = [int(2 ** draw.uniform(0, 26)) for _ in range(60)]
        allocated, reserved = cuda_memory(sizes)
        assert sum(-(-s // 512) * 512 for s in sizes) <= allocated <= reserved and allocated - sum(sizes) < len(sizes) * (MIB + 512)


# --- a real step ------------------------------------------------------------------------------------------------------------


def test_process_agrees_with_the_rule():
    record = step_memory(["sgd", "adamw"], {"layers": 4, "width": 384, "batch_size": 2})
    none, adamw = record["optimizers"].values()
    assert adamw["rule_bytes"] == adamw["state_bytes"] > 50e6 and none["rule_bytes"] == 0
    for level in ("step", "peak"):
        assert adamw[level] - none[level] == pytest.approx(adamw["rule_bytes"], rel=0.05)
    assert none["peak"] > none["backward"] > 2 * record["weight_bytes"] * 0.95


def a_process(monkeypatch, **result):
    "Let every measurement end like this; the optimizers that were asked for are listed."
    asked = []

    def run(command, **kwargs):
        asked.append(json.loads(command[-1])[0])
        return types.SimpleNamespace(**{"returncode": 0, "stdout": "", "stderr": "", **result})

    monkeypatch.setattr(measuring, "subprocess", types.SimpleNamespace(run=run))
    return asked


LEVELS = {key: 400_000_000 for key in ("state_bytes", "model", "forward", "backward", "step", "peak")}


def test_failed_processes_say_why(monkeypatch):
    a_process(monkeypatch, returncode=1, stderr="Traceback\nValueError: no such thing\n")
    with pytest.raises(RuntimeError, match="measuring adan failed: ValueError: no such thing"):
        step_memory(["adan"])
    a_process(monkeypatch, returncode=-9)
    with pytest.raises(RuntimeError, match="want of memory"):
        step_memory(["adan"])


def test_optimizers_are_checked_before_anything_is_measured(monkeypatch):
    asked = a_process(monkeypatch)
    with pytest.raises(KeyError, match="did you mean adamw"):
        step_memory(["sgd", "adamww"])
    with pytest.raises(ValueError, match="lbfgs"):
        step_memory(["sgd", "lbfgs"])
    assert asked == []


def test_second_derivatives_can_be_measured():
    size = {**MODEL, "layers": 1, "width": 16, "vocab_size": 16, "tokens": 4}
    found = measuring._measure_here("adahessian", size, "float32", "cpu")
    assert found["state_bytes"] > 0 and {"model", "forward", "backward", "step", "peak"} <= found.keys()


# --- command line -------------------------------------------------------------------------------------------------------------


def test_command_shows_other_models_and_optimizers():
    done = cli("memory", "resnet18", "convnext_tiny", "--optimizers", "sgd_sai,lbfgs", "--dtype", "bfloat16")
    assert done.exit_code == 0 and "convnext_tiny" in done.output and "LBFGS" in done.output and f"{2 * 28_589_128 / 1e9:.3f}" in done.output


@pytest.mark.parametrize("arguments, said", [(["vit_s61"], "vit_s16"), (["--optimizers", "adanw"], "adan"), (["--dtype", "float23"], "float32"),
                                             (["--out", "x"], "--measure"), (["resnet18", "--measure", "--optimizers", "lbfgs"], "lbfgs")])
def test_wrong_usage_ends_with_2(arguments, said):
    done = cli("memory", *arguments)
    assert done.exit_code == 2 and said in done.output


def test_list_names_everything():
    done = cli("memory", "list")
    assert done.exit_code == 0 and all(name in done.output for name in [*SHAPES, *STATES])


def test_measurement_is_shown_and_kept(tmp_path, monkeypatch):
    asked = a_process(monkeypatch, stdout="a library says hello\n" + json.dumps({"parameters": 1, **LEVELS}))
    done = cli("memory", "resnet18", "--optimizers", "sgd_sai,adamw", "--measure", "--out", tmp_path)
    assert done.exit_code == 0 and asked == ["sgd", "sgd_sai", "adamw"], done.output
    record = json.loads((tmp_path / "memory" / "cpu-float32.json").read_text())
    assert step_memory_path(tmp_path, record) == tmp_path / "memory" / "cpu-float32.json"
    assert record["parameters"] == 29_447_168 and record["optimizers"]["adamw"]["rule_bytes"] > 2 * record["weight_bytes"]
    assert step_memory_table(record).row_count == 3
