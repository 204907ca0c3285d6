"""The loops of accelerate, Trainer, Lightning, peft and timm train as the equations do: see framework_ways.py.

None of these libraries is needed; the tests of a missing one are skipped."""

import pytest
import torch
from framework_ways import FRAMEWORKS, MODULES
from test_ways import check
from torch import nn

from sgd_sai import AdaHessian, SGDSaI


@pytest.mark.parametrize("label", FRAMEWORKS)
def test_framework(label, record_way):
    pytest.importorskip(MODULES[label])
    torch.set_num_threads(1)
    found = FRAMEWORKS[label]()
    check(label, found)
    record_way("frameworks", label, {"SGDSaI": found})


def test_a_is_measured_one_step_after_b():
    "B starts at zero, so that A has no gradient in the first step; it waits, and nothing is frozen."
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)), peft.LoraConfig(r=2, target_modules=["0", "2"])
    )
    opt = SGDSaI(((name, p) for name, p in model.named_parameters() if p.requires_grad), lr=0.05)
    known = []
    for _ in range(2):
        opt.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        opt.step()
        known.append({name.split(".lora_")[1][0] for name in opt.scales()})
    assert known == [{"B"}, {"A", "B"}]


def test_trainer_takes_the_class_and_makes_its_groups(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )
    items = [{"input_ids": torch.randint(50, (12,)), "labels": torch.randint(50, (12,))} for _ in range(16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        weight_decay=0.1,
        learning_rate=0.01,
        bf16=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    loop = transformers.Trainer(model, arguments, train_dataset=items, optimizer_cls_and_kwargs=(SGDSaI, {"lr": 0.01}))
    loop.train()
    opt = loop.optimizer.optimizer if hasattr(loop.optimizer, "optimizer") else loop.optimizer
    assert type(opt) is SGDSaI and [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert len(opt.scales()) == sum(1 for p in model.parameters() if p.requires_grad)


def test_lightning_trains_with_second_derivatives(tmp_path):
    "AdaHessian needs the graph of the gradients: `backward` is a method that a module may override."
    L = pytest.importorskip("lightning")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def backward(self, loss):
            loss.backward(create_graph=True)

        def configure_optimizers(self):
            return AdaHessian(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)))
    loop = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Module()
    loop.fit(module, torch.utils.data.DataLoader(data, batch_size=8))

    plain = Module()
    opt = AdaHessian(plain.parameters(), lr=0.1)
    for (batch,) in torch.utils.data.DataLoader(data, batch_size=8):
        opt.zero_grad()
        plain.net(batch).square().mean().backward(create_graph=True)
        opt.step()
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# --- torchao ----------------------------------------------------------------------------------------------------------


def fake_quantized(model):
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    quantize_(model, QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare"))


def int8_weights(model):
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    quantize_(model, int8_weight_only_quantized_training())


def int8_products(model):
    from torchao.prototype.quantized_training import int8_mixed_precision_training
    from torchao.quantization import quantize_

    quantize_(model, int8_mixed_precision_training())


def float8_products(model):
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(model)


@pytest.mark.parametrize(
    "convert, kind",
    [
        (fake_quantized, "FakeQuantizedLinear"),
        (int8_weights, "Int8QuantizedTrainingLinearWeight"),
        (int8_products, "Int8MixedPrecisionTrainingLinearWeight"),
        (float8_products, "Float8Linear"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_torchao_models_train(convert, kind):
    "The loss of the ordinary model, up to what the form rounds away; every weight has a scale."
    pytest.importorskip("torchao")
    curves = []
    for converted in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
        if converted:
            convert(model)
            assert kind in {type(model[0]).__name__, type(model[0].weight).__name__}
        opt, losses = SGDSaI(model.named_parameters(), lr=1e-2), []
        for step in range(60):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            opt.zero_grad()
            loss = (model(x) - x[:, :32]).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        curves.append(losses)
        assert len(opt.scales()) == 4
    assert sum(curves[1][-10:]) < 0.8 * sum(curves[1][:10])
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subclass_of_parameter_that_stores_nothing_else_is_an_ordinary_one(dtype):
    "Libraries mark parameters by their own class; only those with their own storage are computed on copies."

    class Marked(nn.Parameter):
        pass

    torch.manual_seed(0)
    weight, grads, ends = torch.randn(40, 30).to(dtype), torch.randn(5, 40, 30).to(dtype), []
    for kind in (nn.Parameter, Marked):
        p = kind(weight.clone())
        opt = SGDSaI([p], rounding="nearest")
        for g in grads:
            p.grad = g.clone()
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(
        *ends, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6 if dtype == torch.float32 else 0
    )  # in bfloat16 both compute in float32 and round once
    assert type(p) is Marked


def test_lazy_modules_may_get_their_shapes_later():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    opt = SGDSaI(model.named_parameters())
    model(torch.randn(3, 5)).square().sum().backward()
    opt.step()
    assert len(opt.scales()) == 4
