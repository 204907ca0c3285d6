"""The tasks for a GPU, at sizes for a CPU: which files are taken and held out, tokens that are made once, recipes from
loading to run file, and sweeps that compare like with like.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgd_sai.analysis.audit import audit, decay_per_step, muon_parts
from sgd_sai.analysis.rankings import Experiment
from sgd_sai.experiments.precision import make_accelerator
from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.runs import load_runs
from sgd_sai.experiments.sweep import expand, read_sweep, run_sweep
from sgd_sai.experiments.tasks import python_gpt2 as page
from sgd_sai.experiments.tasks import text
from sgd_sai.experiments.tasks.language_models import END
from sgd_sai.experiments.tasks.python_gpt2 import (
    PYTHON_TASK,
    encode_texts,
    load_python,
    python_gpt2,
    tokens_made_once,
    train_byte_pairs,
)
from sgd_sai.experiments.tasks.python_sources import (
    SHORTEST_LINE,
    Source,
    choose_sources,
    python_files,
    read_source,
    source_folders,
    source_list,
    split_sources,
)
from sgd_sai.experiments.tasks.registry import TASKS, get_task
from sgd_sai.experiments.tasks.task import Data, save_tensors
from sgd_sai.experiments.tasks.text import SHAKESPEARE_LARGE_TASK, TextWindows, build_gpt2, shakespeare_large
from sgd_sai.experiments.train import batches, train

ROOT = Path(__file__).resolve().parents[2]
LARGE = ("shakespeare-gpt-large", "python-gpt2")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def code(i, lines=30):
    "A module unlike the others."
    return "".join(
        f"def function_{i}_{k}(argument, other):\n    return argument + {i * k} * other\n" for k in range(lines)
    )


def write_modules(folder, count=12):
    for i in range(count):
        path = folder / f"package_{i % 3}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code(i))
    return {"stdlib": folder / "package_0", "site-packages": folder}


@pytest.fixture
def folders(tmp_path):
    return write_modules(tmp_path / "sources")


def tiny_python(folders, **changes):
    sizes = dict(layers=1, heads=2, width=16, block=16, vocab_size=300)
    return python_gpt2(**{**sizes, "folders": folders, **changes})


# Which files are taken


@pytest.mark.parametrize(
    "raw, taken",
    [
        (code(1).encode(), True),
        (b"\xef\xbb\xbf" + code(1).replace("\n", "\r\n").encode(), True),
        (code(1)[:500].encode(), False),
        (code(1, 2500).encode(), False),
        (code(1).encode() + b"# \xe9\n", False),
        (code(1).encode() + b"# \0\n", False),
        (b"# This file is auto-generated.\n" + code(1).encode(), False),
        (b"# DO NOT EDIT\n" + code(1).encode(), False),
        (code(1, 60).encode() + b"# do not edit\n", True),  # said of something in the middle of it
        (code(1).encode() + b"x = '" + b"a" * 500 + b"'\n", False),
        (b"TABLE = [\n" + b"    0x00, 0x01, 0x02,\n" * 60 + b"]\n", False),
    ],
    ids="plain,marked,small,large,latin-1,binary,generated,unedited,mentioned,long line,table".split(","),
)
def test_files_that_somebody_wrote_are_taken(raw, taken, tmp_path):
    (tmp_path / "module.py").write_bytes(raw)
    found = read_source(tmp_path / "module.py")
    assert (found is not None) == taken
    if raw.startswith(b"\xef"):
        assert found == code(1)


def test_what_cannot_be_read_is_not_taken(tmp_path):
    assert read_source(tmp_path / "missing.py") is None


def test_folders_that_are_not_visited(tmp_path):
    names = ["json/decoder.py", "site-packages/torch/nn.py", "__pycache__/a.py", ".git/b.py", "json/data.txt", "c.py"]
    for name in names:
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(code(1))
    (tmp_path / "lib" / "linked").symlink_to(tmp_path / "lib" / "json", target_is_directory=True)
    files = python_files({"stdlib": tmp_path / "lib", "site-packages": tmp_path / "lib" / "site-packages"})
    assert list(files) == ["site-packages/torch/nn.py", "stdlib/c.py", "stdlib/json/decoder.py"]
    assert files["stdlib/c.py"] == tmp_path / "lib" / "c.py"


def test_the_interpreters_own_folders_are_found():
    files = python_files(source_folders())
    assert "stdlib/json/decoder.py" in files and "site-packages/torch/__init__.py" in files
    assert list(files) == sorted(files) and not any("/site-packages/" in name for name in files)


contents = st.lists(st.integers(0, 40), min_size=2, max_size=14)


@given(contents=contents, limit=st.integers(1, 30_000), order=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_the_choice_depends_on_names_and_contents_alone(tmp_path_factory, contents, limit, order):
    folder = tmp_path_factory.mktemp("sources")
    for number, i in enumerate(contents):
        (folder / f"m{number}.py").write_text(code(i))
    files = python_files({"stdlib": folder})
    shuffled = list(files.items())
    order.shuffle(shuffled)
    sources = choose_sources(files, limit)
    assert sources == choose_sources(dict(shuffled), limit)
    assert [source.name for source in sources] == sorted(source.name for source in sources)
    assert len({source.text for source in sources}) == len(sources)
    sizes = sorted(len(source.text) for source in sources)
    reached = sum(sizes) >= limit
    assert sum(sizes[:-1]) < limit if reached else len(sources) == len(set(contents))


def lines_of(numbers):
    return "".join(f"this is a long line with number {n}\n" for n in numbers)


sources_made_of_lines = st.lists(st.frozensets(st.integers(0, 30), min_size=1), min_size=2, max_size=30, unique=True)


@given(texts=sources_made_of_lines, every=st.integers(2, 10))
@settings(max_examples=100, deadline=None)
def test_no_held_out_file_is_nearly_in_the_training_text(texts, every):
    made = [lines_of(sorted(numbers)) for numbers in texts]
    sources = [Source(f"{i:02}.py", body, page.digest(body.encode())) for i, body in enumerate(made)]
    split = split_sources(sources, every)
    assert sorted(source for part in split for source in part) == sources
    assert len(split.held_out) + len(split.near_copies) == max(1, len(sources) // every)
    train = set(lines_of(range(31)).splitlines()) & {line for s in split.train for line in s.text.splitlines()}
    for part, near in ((split.held_out, False), (split.near_copies, True)):
        for source in part:
            own = source.text.splitlines()
            assert min(map(len, own)) >= SHORTEST_LINE
            assert (sum(line in train for line in own) > len(own) / 2) == near
    assert split == split_sources(sources[::-1], every)


def test_short_lines_make_no_copies():
    common = "".join(f"return self.{name}\n" for name in "abcdefghijklmnopqrstuvwxyz" * 3)
    sources = [Source(f"{i}.py", common + code(i, 10), f"{i}") for i in range(4)]
    assert [len(part) for part in split_sources(sources, 2)] == [2, 2, 0]


def test_copies_take_no_room(tmp_path):
    for number in range(10):
        (tmp_path / f"copy_{number}.py").write_text(code(1))
    (tmp_path / "other.py").write_text(code(2))
    files = python_files({"stdlib": tmp_path})
    taken = [source.text for source in choose_sources(files, 2 * len(code(1)))]
    assert sorted(taken) == sorted([code(1), code(2)])


def test_a_part_of_the_files_is_from_the_whole_alphabet(tmp_path):
    for letter in "abcdefghijklmnopqrstuvwxyz":
        (tmp_path / f"{letter}.py").write_text(code(ord(letter)))
    names = [source.name for source in choose_sources(python_files({"stdlib": tmp_path}), 12 * len(code(100)))]
    assert len(names) < 16 and min(names) < "stdlib/h" and max(names) > "stdlib/s"


# Tokens


def test_every_file_comes_back_from_its_tokens():
    texts = [code(i) for i in range(70)] + ["naïve = '数'\n"]
    tokenizer = train_byte_pairs(texts[:5], 400)
    counts = []
    tokens = encode_texts(texts, tokenizer, counts.append)
    end = tokenizer.token_to_id(END)
    assert sum(counts) == len(texts) and int((tokens == end).sum()) == len(texts) and tokens[-1] == end
    assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split(END)[:-1] == texts


def test_tokens_are_made_once_and_again_when_a_file_changes(folders, tmp_path, monkeypatch):
    made, make = [], page._make_tokens
    monkeypatch.setattr(page, "_make_tokens", lambda *given: made.append(given) or make(*given))
    load = partial(load_python, tmp_path, block=16, vocab_size=300, folders=folders)
    first, again = load(), load()
    assert len(made) == 1 and first.digest == again.digest and torch.equal(first.train.tokens, again.train.tokens)
    (tmp_path / "sources" / "package_1" / "module_1.py").write_text(code(99))
    changed = load()
    assert len(made) == 2 and changed.digest != first.digest
    assert changed.train.about["list"] != first.train.about["list"]
    assert load_python(tmp_path, block=16, vocab_size=301, folders=folders).digest != changed.digest
    lists = sorted(path.name for path in tmp_path.glob("python-*.txt"))
    assert f"python-{first.train.about['list']}.txt" in lists and len(lists) == 3


def test_the_list_beside_the_tokens_names_every_file(folders, tmp_path):
    data = load_python(tmp_path, block=16, vocab_size=300, folders=folders)
    split = page._chosen(folders, 64_000_000)
    text_of_list = (tmp_path / f"python-{data.train.about['list']}.txt").read_text()
    assert text_of_list == source_list(split) and len(text_of_list.splitlines()) == 12
    about = data.train.about
    assert (about["files"], about["held_out"], about["near_copies"]) == tuple(map(len, split)) == (11, 1, 0)
    assert sum(about["packages"].values()) == 11
    assert about["characters"] == sum(len(source.text) for source in split.train)


def test_held_out_files_are_not_trained_on(folders, tmp_path):
    data = load_python(tmp_path, block=16, vocab_size=300, folders=folders)
    split = page._chosen(folders, 64_000_000)
    tokenizer = train_byte_pairs([source.text for source in split.train], 300)
    for part, rows in ((split.train, data.train.tokens), (split.held_out, data.val.tokens)):
        assert torch.equal(rows, encode_texts([source.text for source in part], tokenizer))


def test_validation_windows_are_spread_evenly(folders, tmp_path):
    long = load_python(tmp_path, block=2, vocab_size=257, folders=folders).val
    assert len(long.tokens) > 3 * page.VALIDATION_WINDOWS
    assert page.VALIDATION_WINDOWS <= len(long) <= page.VALIDATION_WINDOWS + 1
    assert long.stride == len(long.tokens) // page.VALIDATION_WINDOWS > 2
    short = load_python(tmp_path, block=64, vocab_size=300, folders=folders).val
    assert short.stride == 64


LOADING = """
from sgd_sai.experiments.tasks.python_gpt2 import load_python
import sys
from pathlib import Path
places = {"stdlib": Path(sys.argv[2])}
print(load_python(sys.argv[1], block=16, vocab_size=300, folders=places).digest)
"""


def test_two_processes_at_once_make_the_same_tokens(tmp_path):
    write_modules(tmp_path / "sources")
    command = [sys.executable, "-c", LOADING, str(tmp_path / "data"), str(tmp_path / "sources")]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in "12"
    ]
    printed = [process.communicate(timeout=120)[0] for process in started]
    own = load_python(tmp_path / "other", block=16, vocab_size=300, folders={"stdlib": tmp_path / "sources"})
    assert printed == [f"{own.digest}\n"] * 2
    assert sorted(path.suffix for path in (tmp_path / "data").iterdir() if path.is_file()) == [".pt", ".txt"]


def test_two_at_once_make_one(tmp_path):
    made = []

    def make():
        made.append(time.sleep(0.2))
        return {"train": torch.ones(3)}

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: tokens_made_once(tmp_path / "a.pt", make), range(2)))
    assert len(made) == 1 and all(torch.equal(each["train"], torch.ones(3)) for each in found)


def test_a_killed_process_leaves_no_tokens(tmp_path, monkeypatch):
    def killed(tensors, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", killed)
        tokens_made_once(tmp_path / "a.pt", lambda: {"train": torch.ones(3)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert torch.equal(tokens_made_once(tmp_path / "a.pt", lambda: {"train": torch.ones(3)})["train"], torch.ones(3))


def test_damaged_tokens_are_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"nothing that torch wrote")
    with pytest.raises(OSError, match="a.pt cannot be read .*remove it"):
        tokens_made_once(tmp_path / "a.pt", dict)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to .*file"):
        tokens_made_once(tmp_path / "file" / "a.pt", dict)


def test_saved_tensors_replace_a_file_whole(tmp_path):
    for value in (1.0, 2.0):
        save_tensors(tmp_path / "a.pt", {"x": torch.tensor(value)})
    assert torch.load(tmp_path / "a.pt")["x"] == 2 and len(list(tmp_path.iterdir())) == 1


def test_too_few_files_are_counted(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="0 Python files .*empty: give folders"):
        load_python(tmp_path, folders={"stdlib": tmp_path / "empty"})
    few = write_modules(tmp_path / "few", 2)
    with pytest.raises(FileNotFoundError, match="(?s)1 Python files .* 1,024. Install packages"):
        load_python(tmp_path, folders=few)


# From a sweep's file to run files


def write_sweep(folder, task, optimizers):
    lines = f"task: {task}\noptimizers: {optimizers}\nseeds: 1\nsteps: 2\nbatch_size: 2\nprecision: bf16\n"
    (folder / "rehearsal.yaml").write_text(lines)
    return read_sweep(folder / "rehearsal.yaml")


@pytest.fixture
def only_here(monkeypatch):
    "Put a task in the place of a built-in one for the time of a test."
    return lambda task: monkeypatch.setitem(TASKS, task.name, task)


@each_device
def test_python_task_runs_with_all_its_optimizers(folders, tmp_path, only_here, device):
    task = tiny_python(folders)
    only_here(task)
    names = list(task.settings)
    made = run_sweep(write_sweep(tmp_path, task.name, names), tmp_path / "runs", data_dir=tmp_path, device=device)
    assert made["trained"] == 5 and not made["failures"]
    data = task.load(tmp_path)
    for run in load_runs(tmp_path / "runs", task.name):
        assert run["status"] == "finished" and run["data"] == data.digest and run["extra"] == data.train.about
        assert run["hyperparameters"].keys() == task.settings[run["optimizer"]].keys()


@each_device
def test_shakespeare_recipe_runs(tmp_path, monkeypatch, only_here, device):
    monkeypatch.setitem(text.SHAKESPEARE_FILE, "sha256", None)
    (tmp_path / "tinyshakespeare.txt").write_text("What's in a name? That which we call a rose\n" * 40)
    task = shakespeare_large(layers=1, heads=2, width=16, block=8)
    only_here(task)
    sweep = write_sweep(tmp_path, task.name, ["adamw", "muon_sai:row_norm"])
    made = run_sweep(sweep, tmp_path / "runs", data_dir=tmp_path, device=device)
    assert made["trained"] == 2 and not made["failures"]


# The recipes


def test_sizes_are_those_of_the_recipes():
    with torch.device("meta"):
        large = SHAKESPEARE_LARGE_TASK.build({"vocab_size": 65, "block": 256})
        gpt2 = PYTHON_TASK.build({"vocab_size": page.GPT2_TOKENS, "block": 1024})
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    shape = large.config.n_layer, large.config.n_head, large.config.n_embd, large.config.n_positions
    assert large.config.attn_pdrop == 0.2 and gpt2.config.attn_pdrop == 0
    assert shape == (6, 6, 384, 256) and SHAKESPEARE_LARGE_TASK.load.keywords == {"block": 256}
    task = SHAKESPEARE_LARGE_TASK
    assert (task.steps, task.batch_size, task.warmup, task.clip, task.accumulate) == (5000, 64, 100, 1.0, 1)
    assert task.settings["adamw"] == dict(lr=0.001, weight_decay=0.1, betas=(0.9, 0.99))


def test_dropout_acts_everywhere_in_training_and_nowhere_else():
    torch.manual_seed(0)
    model, x = build_gpt2({"vocab_size": 9, "block": 8}, 1, 2, 16, dropout=0.2), torch.arange(8)[None]
    config = model.config
    assert config._attn_implementation == "sdpa"
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.2, 0.2, 0.2)
    assert torch.equal(model.eval()(x).logits, model(x).logits)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module is not model.transformer.h[0].attn.attn_dropout:
            module.p = 0.0
    assert not torch.equal(model.train()(x).logits, model(x).logits)  # of the attention weights, inside of the kernel
    assert not any(m.p for m in build_gpt2({"vocab_size": 9, "block": 8}, 1, 2, 16).modules() if hasattr(m, "p"))


@pytest.mark.parametrize("name", LARGE)
def test_the_sweeps_compare_like_with_like(name):
    sweep, task = read_sweep(ROOT / "sweeps" / name / "gpu.yaml"), get_task(name)
    specs = expand(sweep, Data(range(10**6), [], {}, "0" * 12))
    runs = [asdict(spec) for spec in specs]
    assert sweep.precision == "bf16" and sweep.optimizers[0] == "adamw" and set(sweep.optimizers) == set(task.settings)
    assert audit(Experiment(name, task, runs, [], None)).found == {}
    shared = muon_parts(runs)
    assert shared["muon_adamw"] == shared["muon_sai:row_norm"]
    decays = {}
    for run in runs:
        decays.setdefault(run["optimizer"], []).append(max(decay_per_step(run).values()))
    for found in decays.values():
        assert found == pytest.approx(decays["adamw"], rel=1e-6)
    for optimizer, own in task.settings.items():
        tried = {run["hyperparameters"]["weight_decay"] for run in runs if run["optimizer"] == optimizer}
        assert tried == {own["weight_decay"]}


# Windows that are cut on the device


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_a_batch_is_its_windows(block, stride, data):
    windows = TextWindows(torch.arange(50), block, stride)
    indices = data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=8))
    x, y = windows.cut(torch.tensor(indices))
    assert x.tolist() == [windows[i][0].tolist() for i in indices]
    assert y.tolist() == [windows[i][1].tolist() for i in indices]


def test_batches_are_the_same_in_one_operation_as_window_by_window(folders, tmp_path):
    task = tiny_python(folders)
    data = task.load(tmp_path)

    class Slow(TextWindows):
        cut = None

    slow = data._replace(train=Slow(data.train.tokens, 16))
    spec = make_spec(task, data, "adamw", seed=3, batch_size=5)
    fast_stream, slow_stream = batches(task, data, spec), batches(task, slow, spec)
    for _ in range(20):
        assert all(map(torch.equal, next(fast_stream), next(slow_stream)))
    spec = make_spec(task, data, "adamw", steps=3, batch_size=4)
    plain = replace(task, extra=None)
    fast_run, slow_run = (train(plain, some, spec, device="cpu") for some in (data, slow))
    assert fast_run["final"] == slow_run["final"]


@pytest.mark.gpu
def test_the_text_is_copied_to_the_gpu_once(folders, tmp_path):
    task = tiny_python(folders)
    data, spec = task.load(tmp_path), make_spec(task, task.load(tmp_path), "adamw", batch_size=5)
    prepare = make_accelerator("bf16", "cuda").prepare
    on_gpu, here = batches(task, data, spec, prepare), batches(task, task.load(tmp_path), spec)
    for _ in range(3):
        batch = next(on_gpu)
        assert batch[0].device.type == "cuda" and all(map(torch.equal, [part.cpu() for part in batch], next(here)))
        copy = data.train.copy
    next(on_gpu)
    assert data.train.copy is copy and data.train.tokens.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_attention_on_a_gpu_is_the_flash_kernel(dropout):
    "Which refuses masks: with one, the matrix of attention weights would be stored after all."
    model = build_gpt2({"vocab_size": 65, "block": 64}, 2, 2, 128, dropout).cuda().train()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        model(torch.randint(65, (2, 64), device="cuda")).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
