"""MuonSaI with another rule than the default in the programs that the tutorial names: Trainer's factory form,
Lightning's `configure_optimizers`, peft's adapters. Each trains as the plain loop does."""

import copy
import logging

import pytest
import torch
from programs import (
    RESUME,
    STEPS,
    TRAINER,
    WORDS,
    Net,
    assert_same,
    batch,
    items,
    lightning_module,
    names_by,
    plain,
    train,
    trainable,
)

from sgd_sai import MuonSaI

OPTIONS = dict(lr=0.02, rest="row_norm", weight_decay=0.01, roles={"head": {"lr_factor": 0.5}})


def test_trainer_gives_all_options_to_the_factory(tmp_path):
    "Rule and roles arrive; `learning_rate` and `weight_decay` of the arguments do not; a checkpoint goes on exactly."
    transformers = pytest.importorskip("transformers")

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def loop(model):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            learning_rate=0.3,
            weight_decay=0.3,
            max_grad_norm=0,
            **TRAINER,
        )
        way = (lambda: MuonSaI, dict(OPTIONS))
        return Ordered(model, arguments, train_dataset=items(), optimizer_cls_and_kwargs=way)

    def linear(opt):
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: (STEPS - step) / STEPS)

    expected = plain(lambda model: MuonSaI(model, **OPTIONS), linear)
    first = loop(Net())
    first.train()
    assert_same(first.model, expected)
    again = loop(Net(seed=9))
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{RESUME}")
    assert_same(again.model, expected)
    groups = first.optimizer.optimizer.param_groups
    assert {(group["role"], group["rest"]) for group in groups if not group["muon"]} == {
        ("embedding", "row_norm"),
        ("head", "row_norm"),
        ("vector", "sign"),
    }
    assert {group["lr_factor"] for group in groups if group["role"] in ("head", "vector")} == {0.5, 0.06}


def test_lightning_takes_it_from_configure_optimizers(tmp_path):
    "With a schedule for each step."
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def falling(opt):
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))

    class Module(lightning_module(lightning)):
        def configure_optimizers(self):
            opt = MuonSaI(self.net, **OPTIONS)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": falling(opt), "interval": "step"}}

    module = Module()
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    lightning.Trainer(accelerator="cpu", devices=1, max_steps=STEPS, default_root_dir=str(tmp_path), **quiet).fit(
        module
    )
    assert module.net.passes == STEPS  # the closure of a step is called once
    assert_same(module.net, plain(lambda model: MuonSaI(model, **OPTIONS), falling))


def with_adapters():
    peft = pytest.importorskip("peft")
    model = Net()
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up", "down"], modules_to_save=["head"]))


def test_adapters_are_hidden_matrices_and_a_saved_head_is_a_head():
    model = with_adapters()
    names = names_by("role", MuonSaI(model, lr=0.02, rest="row_norm"), model)
    prefix = "base_model.model."
    assert names == {
        "matrix": {f"{prefix}{layer}.lora_{part}.default.weight" for layer in ("up", "down") for part in "AB"},
        "head": {f"{prefix}head.modules_to_save.default.weight"},
        "vector": {f"{prefix}head.modules_to_save.default.bias"},
    }


def test_adapters_of_a_fused_layer_are_a_matrix_each():
    "GPT-2's query, key and value are split and stored with the inputs first; the adapters beside them are not."
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = dict(vocab_size=WORDS, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    fused = next(row for row in MuonSaI(gpt2).role_table() if row.name.endswith("c_attn.weight"))
    assert fused.matrices == "3 matrices of 8 x 8"
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    rows = MuonSaI(peft.get_peft_model(gpt2, config)).role_table()
    assert [row.matrices for row in rows] == ["1 matrix of 2 x 8", "1 matrix of 24 x 2"]


def test_adapters_step_along_orthogonal_matrices_and_merge():
    """B starts at zero: its first step has singular values near lr times the length of a step. A, whose gradient is
    then zero, waits; what is frozen stays and has no state."""
    model = with_adapters()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = MuonSaI(model, lr=0.02, rest="row_norm", weight_decay=0)
    train(model, opt, stop=1)
    for name, p in trainable(model):
        step = p.detach() - before[name]
        if "lora_B" in name:  # (outputs, 2)
            moved = torch.linalg.svdvals(step) / (0.02 * (p.shape[0] / p.shape[1]) ** 0.5)
            assert moved.max() < 1.25 and moved[0] > 0.65, (name, moved)
        if "lora_A" in name:
            assert not step.any(), name
    train(model, opt, start=1)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, _ in trainable(model)}
    assert len(opt.state) == len(changed)
    expected = model(*batch(50))["loss"].item()
    merged = copy.deepcopy(model).merge_and_unload()
    assert merged(*batch(50))["loss"].item() == pytest.approx(expected, rel=1e-5)
