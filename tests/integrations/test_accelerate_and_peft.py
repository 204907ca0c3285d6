"""accelerate's loop with accumulation, clipping and a schedule; and adapters of peft, saved and loaded.

In both, a checkpoint goes on exactly."""

import copy

import pytest
import torch
from programs import RESUME, SETTINGS, STEPS, Net, assert_same, batch, build, train, trainable

from sgd_sai import AdaHessian, SGDSaI

each_class = pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)


def falling(opt):
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))


def accelerated(cls, folder, start=0):
    "The model after accelerate's loop: two parts for each step, clipping, a schedule; with `start` from the folder."
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Net(seed=9 if start else 0)
    opt = build(cls, model)
    model, opt, schedule = accelerator.prepare(model, opt, falling(opt))
    if start:
        accelerator.load_state(folder)
    for step in range(start, STEPS):
        for part in zip(*(column.chunk(2) for column in batch(step)), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(model(*part)["loss"], create_graph=cls is AdaHessian)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                schedule.step()
                opt.zero_grad()
        if step + 1 == RESUME and not start:
            accelerator.save_state(folder)
    return model


def in_two_parts(cls):
    "The model after the same by hand."
    model = Net()
    opt = build(cls, model)
    schedule = falling(opt)
    for step in range(STEPS):
        opt.zero_grad()
        for part in zip(*(column.chunk(2) for column in batch(step)), strict=True):
            (model(*part)["loss"] / 2).backward(create_graph=cls is AdaHessian)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
    return model


@each_class
def test_accumulation_clipping_schedule_and_checkpoint(cls, tmp_path):
    expected = in_two_parts(cls)
    assert_same(accelerated(cls, tmp_path), expected)
    assert_same(accelerated(cls, tmp_path, start=RESUME), expected)


def test_prepare_keeps_a_scale_that_is_a_function():
    "accelerate saves and loads the state of the optimizer in `prepare`, and a function cannot be saved."
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    def rule(grad):
        return 2.0

    model = Net()
    opt = SGDSaI(model.named_parameters(), lr=0.01, scale=rule)
    model, wrapped = accelerate.Accelerator(cpu=True).prepare(model, opt)
    train(model, wrapped, stop=1)
    assert opt.param_groups[0]["scale"] is rule and set(opt.scales().values()) == {2.0}


# --- peft -------------------------------------------------------------------------------------------------------------


def with_adapters(seed=0):
    peft = pytest.importorskip("peft")
    model = Net()
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up", "down"], modules_to_save=["head"]))


@each_class
def test_adapters_are_saved_and_loaded(cls, tmp_path):
    "`save_pretrained`, then `from_pretrained(is_trainable=True)` with a new optimizer that loads its state."
    peft = pytest.importorskip("peft")
    model = with_adapters()
    opt = build(cls, model)
    assert {p for group in opt.param_groups for p in group["params"]} == {p for _, p in trainable(model)}
    train(model, opt, stop=RESUME)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(opt.state_dict())
    train(model, opt, start=RESUME)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    resumed = build(cls, again)
    resumed.load_state_dict(state)
    train(again, resumed, start=RESUME)
    for (name, p), (_, q) in zip(trainable(again), trainable(model), strict=True):
        assert torch.equal(p, q), name


@each_class
def test_a_second_adapter_joins_and_the_first_is_frozen(cls):
    "Continual LoRA: what is frozen stays to the last bit, without decay; what joins is trained."
    model = with_adapters()
    opt = build(cls, model, weight_decay=0.1)
    train(model, opt, stop=2)
    peft = pytest.importorskip("peft")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up"]))
    model.set_adapter("second")
    first = {name: p for name, p in model.named_parameters() if ".default" in name and ".lora_" in name}
    joined = [(name, p) for name, p in trainable(model) if ".second" in name]
    marks = dict(muon=True) if "muon" in opt.param_groups[0] else {}
    opt.add_param_group(dict(params=joined, **marks))
    kept, before = {name: p.detach().clone() for name, p in first.items()}, [p.detach().clone() for _, p in joined]
    train(model, opt, start=2, stop=5)
    assert all(torch.equal(p, kept[name]) for name, p in first.items()) and len(first) == 4
    assert not any(torch.equal(p, q) for (_, p), q in zip(joined, before, strict=True)) and len(joined) == 2
