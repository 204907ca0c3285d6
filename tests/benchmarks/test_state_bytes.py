"Bytes of state: rules against real optimizers, tables, the CUDA allocator by hand, and the command line."

import random
from collections import Counter

import pytest
import torch
from typer.testing import CliRunner

from sgd_sai.benchmarks.cuda_allocator import MIB, cuda_memory
from sgd_sai.benchmarks.model_shapes import MODELS, named_shapes
from sgd_sai.benchmarks.state_bytes import (
    PAPER,
    PAPER_MODELS,
    SHOWN,
    memory_table,
    paper_table,
    real_state,
    state_buffers,
    state_size,
)
from sgd_sai.cli.app import app
from sgd_sai.experiments.errors import UsageError
from sgd_sai.experiments.optimizer_entry import entry_names
from sgd_sai.experiments.optimizers import get_optimizer, optimizer_names
from sgd_sai.experiments.state_rules import lbfgs_rule, state_bytes, value_bytes

NAMES = optimizer_names("state")
ODD = {
    "scalar": (),
    "one": (1,),
    "bias": (5,),
    "weight": (7, 3),
    "row": (1, 4),
    "conv1d": (2, 3, 5),
    "conv": (4, 3, 3, 3),
    "long": (300,),
}
EMBEDDED = {
    "embed_tokens.weight": (6, 4),
    "layers.0.q_proj.weight": (512, 256),
    "layers.0.attn.qkv.weight": (96, 3),
    "lm_head.weight": (6, 4),
}


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], terminal_width=100)


# --- rules ----------------------------------------------------------------------------------------------------------


def kept(opts):
    "Bytes of the state by key."
    found = Counter()
    for opt in opts:
        for state in opt.state.values():
            for key, value in state.items():
                found[key] += value_bytes(value)
    return {key: n for key, n in found.items() if n}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_rule_is_what_the_real_optimizer_keeps(name, dtype):
    ruled = Counter()
    for buffer in state_buffers(name, ODD, dtype):
        ruled[buffer.key] += buffer.bytes
    opts = real_state(name, ODD, dtype)
    assert kept(opts) == {key: n for key, n in ruled.items() if n}
    assert sum(map(state_bytes, opts)) == state_size(name, ODD, dtype)


@pytest.mark.parametrize("name", NAMES)
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
    assert (
        state_size("sgd_sai_kahan", shapes) == 4 * n + 8 * tensors
        and state_size("sgd_sai_kahan", shapes, torch.bfloat16) == 4 * n + 8 * tensors
    )
    assert state_size("adamw", shapes) == 8 * n + 4 * tensors and state_size("adan", shapes) == 16 * n + 4 * tensors
    assert 1 < state_size("sgd_sai_int8", shapes) / n < 1.02
    assert (
        state_size("sgd_sai_bf16", shapes) - 8 * tensors
        == 2 * n + 8 * tensors
        == state_size("sgd_sai_bf16", shapes, torch.bfloat16)
    )
    assert state_size("adafactor", shapes) < 0.02 * n


def test_unknown_optimizer_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean adan"):
        state_buffers("adam_n", ODD)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_table_prints_shows_converts_and_plots():
    table = memory_table(["resnet18", "vit_s16"], ["sgd_sai", "adamw"], torch.bfloat16)
    assert [(row.model, row.optimizer) for row in table] == [
        (m, o) for m in ("resnet18", "vit_s16") for o in ("sgd_sai", "adamw")
    ]
    lines = repr(table).splitlines()
    assert (
        lines[1].split() == ["GB", "GiB"] * 2
        and lines[2].startswith("(the weights)")
        and f"{2 * 11_689_512 / 1e9:.3f}" in lines[2]
    )
    assert table._repr_html_().count("<tr>") == 5
    frame = table.to_pandas()
    assert frame.weight_bytes.tolist() == [2 * 11_689_512] * 2 + [2 * 22_050_664] * 2 and list(frame.state_bytes) == [
        row.state_bytes for row in table
    ]
    assert "resnet18" in table.plot("resnet18").axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="gpt2"):
        table.plot("gpt2")


def test_default_table_fits_into_100_columns():
    assert max(map(len, repr(memory_table()).splitlines())) <= 100
    assert set(PAPER_MODELS) <= set(MODELS) and set(SHOWN) <= {
        name for n in NAMES for name in entry_names(get_optimizer(n))
    }


def test_paper_cells():
    rows = {(row.model, row.optimizer): row for row in paper_table()}
    assert rows.keys() == PAPER.keys()
    for key, row in rows.items():
        printed, ours = PAPER[key], row.cuda / 2**30
        assert abs(ours / printed - 1) < 0.02 or f"{ours:.2f}" == f"{printed:.2f}", key


# --- CUDA's allocator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, allocated, reserved",
    [
        ([], 0, 0),
        ([0], 0, 0),
        ([1], 512, 2 * MIB),
        ([512], 512, 2 * MIB),
        ([513], 1024, 2 * MIB),
        ([MIB, MIB], 2 * MIB, 2 * MIB),
        ([MIB, MIB, 1], 2 * MIB + 512, 4 * MIB),
        ([MIB + 1], MIB + 512, 20 * MIB),
        ([2 * MIB] * 10, 20 * MIB, 20 * MIB),
        ([6 * MIB] * 3, 18 * MIB, 20 * MIB),
        ([19 * MIB // 2] * 2, 20 * MIB, 20 * MIB),  # 1 MiB would be left after the second: it gets 10.5
        ([10 * MIB], 10 * MIB, 10 * MIB),
        ([10 * MIB + 1], 10 * MIB + 512, 12 * MIB),
        ([11 * MIB], 12 * MIB, 12 * MIB),
        ([25 * MIB], 26 * MIB, 26 * MIB),
        ([12 * MIB - 3 * MIB // 2, 3 * MIB // 2], 12 * MIB, 12 * MIB),  # the rest of a segment serves the next
        ([18 * MIB - 3 * MIB // 2, 8 * MIB, 3 * MIB // 2], 26 * MIB, 38 * MIB),  # and the smallest that fits is taken
        ([MIB, 700_000, 300_000], MIB + 700_416 + 300_032, 2 * MIB),
    ],
)
def test_allocator_by_hand(sizes, allocated, reserved):
    assert cuda_memory(sizes) == (allocated, reserved)


def test_allocator_never_gives_less_than_is_asked_for_nor_more_than_it_has():
    draw = random.Random(0)
    for _ in range(50):
        sizes = [int(2 ** draw.uniform(0, 26)) for _ in range(60)]
        allocated, reserved = cuda_memory(sizes)
        assert sum(-(-s // 512) * 512 for s in sizes) <= allocated <= reserved and allocated - sum(sizes) < len(
            sizes
        ) * (MIB + 512)


# --- command line ---------------------------------------------------------------------------------------------------


def test_command_shows_other_models_and_optimizers():
    done = cli("memory", "resnet18", "convnext_tiny", "--optimizers", "sgd_sai,lbfgs", "--dtype", "bfloat16")
    assert (
        done.exit_code == 0
        and "convnext_tiny" in done.output
        and "LBFGS" in done.output
        and f"{2 * 28_589_128 / 1e9:.3f}" in done.output
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["vit_s61"], "vit_s16"),
        (["--optimizers", "adanw"], "adan"),
        (["--dtype", "float23"], "float32"),
        (["--out", "x"], "--measure"),
        (["resnet18", "--measure", "--optimizers", "lbfgs"], "lbfgs"),
    ],
)
def test_wrong_usage_ends_with_2(arguments, said):
    done = cli("memory", *arguments)
    assert done.exit_code == 2 and said in done.output


def test_list_names_everything():
    done = cli("memory", "list")
    assert done.exit_code == 0 and all(name in done.output for name in [*MODELS, *NAMES])
