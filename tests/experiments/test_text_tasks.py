"""The tasks on text.

Recipes run from loading to run file on small folders of the real form, splits share nothing, padding costs nothing,
and errors say what to put where.
"""

import copy
import hashlib
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn

from sgd_sai.experiments.run_specs import make_spec
from sgd_sai.experiments.runs import load_runs, save_run
from sgd_sai.experiments.tasks import answers, language_models, lora, sentiment
from sgd_sai.experiments.tasks.answers import TextPairs, generate, predict_answer
from sgd_sai.experiments.tasks.language_models import END, KJV_TASK, OPENWEBTEXT_TASK, gpt2_tokenizer, write_tokens
from sgd_sai.experiments.tasks.lora import LORA_E2E, LORA_SMOLLM2, add_lora, read_wordnet, split_terms
from sgd_sai.experiments.tasks.sentiment import SENTIMENT, read_snippets
from sgd_sai.experiments.tasks.task import Data, Task, digest
from sgd_sai.experiments.tasks.text import build_gpt2, predict_next
from sgd_sai.experiments.train import train

TEXT = (
    "In the beginning was the word, and the word was with the reader. " * 40
    + "And the end of the word was not yet: the reader went on, naïve as before.\n" * 20
)
LLAMA = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def byte_pairs():
    from tokenizers.implementations import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=300, special_tokens=[END], show_progress=False)
    return tokenizer


@pytest.fixture
def gpt2_files(tmp_path, monkeypatch):
    "A folder with a small tokenizer in the place of GPT-2's."
    (tmp_path / "gpt2").mkdir()
    byte_pairs().save_model(str(tmp_path / "gpt2"))
    own = [
        {**file, "sha256": hashlib.sha256((tmp_path / "gpt2" / file["name"]).read_bytes()).hexdigest()}
        for file in language_models.GPT2_FILES
    ]
    monkeypatch.setattr(language_models, "GPT2_FILES", own)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", refuse)


def save_fast_tokenizer(tokenizer, folder, **special):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special).save_pretrained(folder)


@pytest.fixture
def sentiment_files(tmp_path, monkeypatch):
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel

    rows = [
        (kind, f"{word} film, number {i}", f"film {i // 4}")
        for i in range(160)
        for kind, word in [[("fresh", "a good"), ("rotten", "a bad")][i % 2]]
    ]
    rows += [("plot", "somebody does something", "film 1"), rows[0][:2] + ("film 39",)]
    (tmp_path / "movie-snippets").mkdir()
    file = tmp_path / "movie-snippets" / sentiment.SNIPPETS_FILE["name"]
    pd.DataFrame(rows, columns=["category", "text", "movie_name"]).to_csv(file, index=False)
    monkeypatch.setitem(sentiment.SNIPPETS_FILE, "sha256", hashlib.sha256(file.read_bytes()).hexdigest())

    model = tmp_path / "all-MiniLM-L6-v2"
    words = BertWordPieceTokenizer()
    words.train_from_iterator([text for _, text, _ in rows], vocab_size=100, show_progress=False)
    BertModel(
        BertConfig(
            vocab_size=words.get_vocab_size(),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).save_pretrained(model)
    save_fast_tokenizer(words, model, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return tmp_path


@pytest.fixture
def wordnet_files(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    (tmp_path / "wordnet").mkdir()
    licence = "  1 This software and database is being provided to you | as it is.\n"
    for file, letter in zip(lora.WORDNET_FILES, "nvar", strict=True):
        lines = [
            f"{i:08d} 03 {letter} 02 term_{letter}_{i % 90}{'(p)' if letter == 'a' else ''} 0 other 0 000 "
            f'| the {i}th word; "an example"\n'
            for i in range(100)
        ]
        (tmp_path / "wordnet" / file).write_text(licence + "".join(lines))
    model, tokenizer = tmp_path / "SmolLM2-135M-Instruct", byte_pairs()
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **LLAMA)).save_pretrained(model)
    save_fast_tokenizer(tokenizer, model, eos_token=END)
    return tmp_path


@pytest.fixture
def e2e_files(gpt2_files):
    from transformers import GPT2Config, GPT2LMHeadModel

    (gpt2_files / "e2e").mkdir()
    for k, name in enumerate(lora.E2E_FILES):
        rows = [
            (f"name[Inn {i // 2}], area[city {k}]", f"The word of inn {i // 2} is with the reader, in version {i}.")
            for i in range(20)
        ]
        pd.DataFrame(rows, columns=["MR", "ref"] if k else ["mr", "ref"]).to_csv(gpt2_files / "e2e" / name, index=False)
    size = gpt2_tokenizer(gpt2_files).get_vocab_size()
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        gpt2_files / "gpt2-medium"
    )
    return gpt2_files


@pytest.fixture
def openwebtext_files(gpt2_files):
    write_tokens([TEXT] * 6, gpt2_tokenizer(gpt2_files), gpt2_files / "openwebtext", every=3)
    return gpt2_files


def two_steps(task, data, folder, optimizer="sgd_sai", **changes):
    "Two steps of a task as it is, from its settings to its run file."
    spec = make_spec(task, data, optimizer, steps=2, batch_size=min(task.batch_size, 8), **changes)
    save_run(folder, spec, train(task, data, spec, device="cpu"))
    (run,) = load_runs(folder, task.name)
    assert run["status"] == "finished" and run["history"][-1]["step"] == 2 and run["data"] == data.digest
    return run


# The recipes, from loading to run file


def test_openwebtext_recipe_runs(openwebtext_files, tmp_path):
    data = OPENWEBTEXT_TASK.load(openwebtext_files)
    assert data.sizes == {"vocab_size": 50257, "block": 1024, "layers": 12, "heads": 12, "width": 768}
    data = language_models.load_openwebtext(openwebtext_files, block=16)
    data = data._replace(sizes={**data.sizes, "vocab_size": 300, "layers": 1, "heads": 2, "width": 8})
    run = two_steps(OPENWEBTEXT_TASK, data, tmp_path / "runs")
    assert run["final"]["val_loss"] < run["history"][0]["val_loss"]


def test_e2e_recipe_runs(e2e_files, tmp_path):
    data = LORA_E2E.load(e2e_files)
    assert len(data.train) == len(data.val) == 20 and len(data.val.cases) == 10
    assert [len(case.references) for case in data.val.cases] == [2] * 10
    assert data.val.decode(data.val.cases[3].prompt) == "name : Inn 3 | area : city 2"
    task = replace(
        LORA_E2E,
        extra=lambda model, data: answers.generation_scores(
            model, data, tokens=4, num_beams=2, length_penalty=0.8, no_repeat_ngram_size=4
        ),
    )
    run = two_steps(task, data, tmp_path / "runs")
    assert 0 <= run["extra"]["bleu"] <= 100 and 0 <= run["extra"]["chrf"] <= 100 and len(run["extra"]["samples"]) == 3


def test_wordnet_task_runs(wordnet_files, tmp_path):
    data = LORA_SMOLLM2.load(wordnet_files)
    ids, mask, labels = data.val[0]
    assert data.val.decode(ids[labels != -100].tolist()).strip() == data.val.cases[0].references[0]
    assert data.val.decode(ids[mask.bool() & (labels == -100)].tolist()) == data.val.decode(data.val.cases[0].prompt)
    run = two_steps(LORA_SMOLLM2, data, tmp_path / "runs", lr=0.1)
    assert json.dumps(run["extra"]["samples"][0])


def test_sentiment_task_runs_and_repeats_itself(sentiment_files, tmp_path):
    data = SENTIMENT.load(sentiment_files)
    assert len(data.train) + len(data.val) == 160
    runs = [two_steps(SENTIMENT, data, tmp_path / f"runs{i}") for i in range(2)]
    assert [p["val_loss"] for p in runs[0]["history"]] == [p["val_loss"] for p in runs[1]["history"]]
    torch.manual_seed(0)
    model = SENTIMENT.build(data.sizes)
    assert all(p.requires_grad for p in model.parameters()) and not any(
        m.p for m in model.modules() if isinstance(m, nn.Dropout)
    )


def test_bible_task_runs(gpt2_files, tmp_path):
    (gpt2_files / "kjv.txt").write_text(
        "Preface\n*** START OF THE PROJECT GUTENBERG EBOOK ***\n"
        + TEXT
        + "*** END OF THE PROJECT GUTENBERG EBOOK ***\nLicence\n"
    )
    data = language_models.load_kjv(gpt2_files, block=16)
    tokens = torch.cat([data.train.tokens, data.val.tokens])
    assert data.digest == digest(TEXT.strip().encode())  # without preface and licence
    assert tokens.unique().tolist() == list(range(data.sizes["vocab_size"]))  # numbered without gaps
    two_steps(KJV_TASK, data, tmp_path / "runs")


# Sizes of the real models, nothing allocated


def count(model, trainable=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def test_sizes_of_the_papers_models():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        assert count(OPENWEBTEXT_TASK.build({**language_models.GPT2_SMALL, "block": 1024})) == 124_439_808
        medium = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        assert count(medium) == 354_823_168
        assert count(add_lora(medium, rank=4, alpha=32, targets=["c_attn"], conv1d=True), trainable=True) == 393_216
        shape = dict(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        smol = LlamaForCausalLM(LlamaConfig(**shape))
        assert count(smol) == 134_515_008
        assert count(add_lora(smol, rank=8, alpha=16, targets=["q_proj", "v_proj"]), trainable=True) == 460_800
    assert OPENWEBTEXT_TASK.batch_size == 480 and OPENWEBTEXT_TASK.batch_size // OPENWEBTEXT_TASK.accumulate == 12


# Splits


def test_no_film_and_no_sentence_is_in_both_parts(sentiment_files):
    frame = read_snippets(sentiment_files / "movie-snippets" / sentiment.SNIPPETS_FILE["name"])
    train, val = frame[~frame.held_out], frame[frame.held_out]
    assert len(train) and len(val) and not set(train.movie) & set(val.movie) and not frame.text.duplicated().any()
    assert set(frame.label) == {0, 1}


def test_no_sense_and_no_term_is_in_both_parts(wordnet_files):
    frame = read_wordnet(wordnet_files / "wordnet")
    assert (
        len(frame) == 400
        and frame.sense.is_unique
        and frame.iloc[0].tolist() == ["n00000000", "noun", "term n 0", "the 0th word"]
    )
    assert not frame.term.str.contains("[_(]").any()
    train, val = split_terms(frame, 300, 5)
    assert (
        len(val) == 5
        and len(train) > 100
        and not set(train.sense) & set(val.sense)
        and not set(train.term) & set(val.term)
    )
    again, _ = split_terms(frame, 300, 5)
    assert train.equals(again)


def test_the_bible_is_divided_without_overlap(gpt2_files):
    (gpt2_files / "kjv.txt").write_text(TEXT)
    data = language_models.load_kjv(gpt2_files, block=16)
    whole = gpt2_tokenizer(gpt2_files).encode(TEXT.strip()).ids
    assert len(data.train.tokens) + len(data.val.tokens) == len(whole) and len(data.train.tokens) == int(
        0.9 * len(whole)
    )


# Tokens


def test_gpt2_tokenizer_gives_back_every_text(gpt2_files):
    tokenizer = gpt2_tokenizer(gpt2_files)
    for text in (TEXT, "", " ", "\t\n\n", "ÄÖÜ – 数 🙂", "a  b   c"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(f"the{END}").ids[-1] == tokenizer.token_to_id(END)


def test_tokenizer_that_loses_text_is_refused(gpt2_files, monkeypatch):
    (gpt2_files / "gpt2" / "vocab.json").write_text(json.dumps({END: 0, "a": 1, "b": 2}))
    (gpt2_files / "gpt2" / "merges.txt").write_text("#version: 0.2\n")
    monkeypatch.setattr(
        language_models, "GPT2_FILES", [{**file, "sha256": None} for file in language_models.GPT2_FILES]
    )
    with pytest.raises(ValueError, match="does not come back"):
        gpt2_tokenizer(gpt2_files)


def test_token_files_hold_what_was_written(openwebtext_files):
    tokenizer, data = gpt2_tokenizer(openwebtext_files), language_models.load_openwebtext(openwebtext_files, block=16)
    one = tokenizer.encode(TEXT).ids + [tokenizer.token_to_id(END)]
    assert data.train.tokens.tolist() == one * 4 and data.val.tokens.tolist() == one * 2
    x, y = data.train[5]
    assert x.tolist() == (one * 4)[5:21] and y.tolist() == (one * 4)[6:22] and x.dtype == torch.int64
    assert not list((openwebtext_files / "openwebtext").glob("*.part"))


def test_digest_of_token_files_sees_a_change(openwebtext_files):
    before = language_models.load_openwebtext(openwebtext_files).digest
    with open(openwebtext_files / "openwebtext" / "val.bin", "ab") as f:
        f.write(b"\0\0")
    assert language_models.load_openwebtext(openwebtext_files).digest != before


# Losses


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, **LLAMA))


def test_padding_does_not_change_the_loss_of_answers():
    prompts, answers = [[3, 4, 5], [6]], [[7, 8, 0], [9, 10, 11, 12, 13, 0]]
    model, pairs = small_llama(), TextPairs(prompts, answers, end=0, decode=str)
    together = predict_answer(model, pairs[:])[0]
    alone = [
        predict_answer(model, TextPairs([p], [a], end=0, decode=str)[:])[0]
        for p, a in zip(prompts, answers, strict=True)
    ]
    assert together.item() == pytest.approx((3 * alone[0] + 6 * alone[1]).item() / 9, rel=1e-5)
    wider = [
        torch.cat([column, torch.full((2, 5), value)], 1)
        for column, value in zip(pairs.tensors, (0, 0, -100), strict=True)
    ]
    assert predict_answer(model, wider)[0].item() == pytest.approx(together.item(), rel=1e-6)
    other = [pairs.tensors[0].where(pairs.tensors[1] == 1, 17), *pairs.tensors[1:]]  # what stands on the padding
    assert predict_answer(model, other)[0].item() == pytest.approx(together.item(), rel=1e-6)


def test_padding_does_not_change_a_classification(sentiment_files):
    data = SENTIMENT.load(sentiment_files)
    torch.manual_seed(0)
    model = SENTIMENT.build(data.sizes).eval()
    ids, mask, y = data.train[:8]
    longest = int(mask.sum(1).max())
    assert longest < ids.shape[1]
    short, full = (
        sentiment.classify_text(model, batch)[0].item()
        for batch in ((ids[:, :longest], mask[:, :longest], y), (ids, mask, y))
    )
    assert short == pytest.approx(full, rel=1e-5)


def test_prompts_have_no_loss():
    prompts, answers = [[3, 4, 5]], [[7, 8, 0]]
    model, ids = small_llama(), torch.tensor([[3, 4, 5, 7, 8, 0]])
    logits = model(ids).logits[0]
    expected = nn.functional.cross_entropy(logits[2:5], ids[0, 3:])
    torch.testing.assert_close(predict_answer(model, TextPairs(prompts, answers, end=0, decode=str)[:])[0], expected)


def test_generated_answers_do_not_depend_on_their_neighbours():
    model, prompts = small_llama().eval(), [[3, 4, 5, 6, 7], [8], [9, 10]]
    assert generate(model, prompts, end=0, tokens=6) == [generate(model, [p], end=0, tokens=6)[0] for p in prompts]


# Batches in parts


def test_parts_of_a_batch_make_the_step_of_the_whole():
    data = Data(
        *[torch.utils.data.TensorDataset(torch.randint(20, (n, 8)), torch.randint(20, (n, 8))) for n in (40, 8)],
        {"vocab_size": 20, "block": 8},
        "0" * 12,
    )

    def losses(accumulate, batch_size):
        task = Task(
            name="toy",
            title="",
            source="",
            licence="",
            minutes=0,
            load=lambda folder: data,
            build=lambda sizes: build_gpt2(sizes, 1, 2, 16),
            loss=predict_next,
            metric="val_loss",
            steps=4,
            batch_size=batch_size,
            warmup=0,
            eval_every=1,
            clip=0.5,
            settings={"sgd_sai": dict(lr=0.05, weight_decay=0.1)},
            accumulate=accumulate,
        )
        return [p["val_loss"] for p in train(task, data, make_spec(task, data, "sgd_sai"), device="cpu")["history"]]

    for batch_size, accumulate in ((12, 4), (10, 4), (3, 8)):  # equal parts, a smaller last one, fewer items than parts
        assert losses(accumulate, batch_size) == pytest.approx(losses(1, batch_size), rel=1e-5)


# LoRA


def test_only_lora_is_trained():
    model = add_lora(small_llama(), rank=2, alpha=4, targets=["q_proj", "v_proj"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all("lora_A" in name or "lora_B" in name for name in names)
    before = copy.deepcopy(model.state_dict())
    pairs = TextPairs([[3, 4, 5], [6]], [[7, 8, 0], [9, 10, 0]], end=0, decode=str)
    data = Data(pairs, pairs, {}, "0" * 12)
    task = replace(LORA_SMOLLM2, build=lambda sizes: model, extra=None, steps=3, batch_size=2)
    assert train(task, data, make_spec(task, data, "sgd_sai"), device="cpu")["status"] == "finished"
    after = model.state_dict()
    assert {
        name for name in after if not torch.equal(after[name], before[name])
    } == names  # A too, though its first gradient is zero


# Errors


@pytest.mark.parametrize(
    "load, mentions",
    [
        (language_models.load_kjv, ["kjv.txt", "gutenberg.org"]),
        (language_models.load_openwebtext, ["train.bin and val.bin", "openwebtext", "write_tokens"]),
        (sentiment.load_sentiment, [sentiment.SNIPPETS_FILE["name"], "movie-snippets", "github.com"]),
        (
            lora.load_wordnet,
            ["SmolLM2-135M-Instruct", "model.safetensors", "tokenizer.json", "huggingface.co/HuggingFaceTB"],
        ),
        (lora.load_e2e, ["trainset.csv", "testset_w_refs.csv", "e2e-dataset.zip"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_missing_files_are_named(load, mentions, tmp_path, no_network):
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path)
    for text in [*mentions, str(tmp_path.resolve()), "--data"]:
        assert text in str(caught.value)


def test_missing_wordnet_and_model_are_named(wordnet_files, e2e_files, no_network):
    (wordnet_files / "wordnet" / "data.adv").unlink()
    with pytest.raises(FileNotFoundError, match="data.adv(.|\n)*princeton.edu"):
        lora.load_wordnet(wordnet_files)
    (e2e_files / "gpt2-medium" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="gpt2-medium(.|\n)*config.json(.|\n)*huggingface.co") as caught:
        lora.load_e2e(e2e_files)
    assert "safetensors" not in str(caught.value)  # it is there
