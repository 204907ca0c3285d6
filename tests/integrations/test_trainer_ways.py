"""Hugging Face Trainer takes an optimizer in three ways: an object, a class (or a factory) with its arguments, and a
subclass with `create_optimizer`. In each it trains as the plain loop does, and a checkpoint goes on exactly."""

import pytest
import torch
from programs import (
    DECAYED,
    HIDDEN,
    RESUME,
    SETTINGS,
    STEPS,
    TRAINER,
    Net,
    assert_same,
    build,
    decay_groups,
    items,
    plain,
)

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI

each_class = pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def trainer(transformers, tmp_path):
    "A function that makes a Trainer that reads the items in order, for one class of optimizer."

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def log(self, *args):
            pass

    class Curved(Ordered):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss, create_graph=True)
            return loss.detach()

    def make(cls, model, mixin=object, arguments=None, **more):
        base = Curved if cls is AdaHessian else Ordered
        kind = type("Made", (mixin, base) if mixin is not object else (base,), {})
        settings = TRAINER | dict(weight_decay=0.1, warmup_steps=2)
        made = transformers.TrainingArguments(str(tmp_path), **settings | (arguments or {}))
        return kind(model, made, train_dataset=items(), **more)

    return make


def warm_up_and_decay(opt):
    "Trainer's linear schedule with two steps of warm-up: no gradient is used in the first one."
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: step / 2 if step < 2 else (STEPS - step) / (STEPS - 2))


def own(loop):
    "The optimizer inside of accelerate's wrapper."
    return getattr(loop.optimizer, "optimizer", loop.optimizer)


def check_run_and_resume(make_loop, expected, folder):
    "Trains as `expected`, and once more from the checkpoint with other weights; the optimizer that was made."
    loop = make_loop(Net())
    loop.train()
    assert_same(loop.model, expected)
    again = make_loop(Net(seed=9))
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-{RESUME}")
    assert_same(again.model, expected)
    return own(loop)


@each_class
def test_an_object_and_its_schedule(cls, trainer, tmp_path):
    "`optimizers=(optimizer, schedule)`, with Trainer's clipping."

    def make_loop(model):
        opt = build(cls, model)
        return trainer(cls, model, optimizers=(opt, warm_up_and_decay(opt)))

    check_run_and_resume(make_loop, plain(lambda model: build(cls, model), warm_up_and_decay, clip=1.0), tmp_path)


@pytest.mark.parametrize("cls", [SGDSaI, Adan, AdaHessian], ids=lambda cls: cls.__name__)
def test_a_class_gets_groups_with_and_without_decay(cls, trainer, tmp_path):
    expected = plain(lambda model: cls(decay_groups(model, 0.1), **SETTINGS[cls]), warm_up_and_decay, clip=1.0)

    def make_loop(model):
        return trainer(cls, model, optimizer_cls_and_kwargs=(cls, dict(SETTINGS[cls])))

    opt = check_run_and_resume(make_loop, expected, tmp_path)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in opt.param_groups] == [len(DECAYED), 9 - len(DECAYED)]


def test_a_class_that_needs_marked_groups_says_so(trainer):
    "Trainer's groups do not say which parameters are hidden matrices: nothing trains without Muon silently."
    model = Net()
    loop = trainer(MuonSaI, model, optimizer_cls_and_kwargs=(MuonSaI, dict(lr=0.02)))
    with pytest.raises(ValueError, match="muon"):
        loop.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters(), strict=True))


def test_a_factory_gives_the_model_to_muon(trainer, tmp_path):
    "What is no class of optimizers is called, and what it returns is called with the model."
    expected = plain(lambda model: MuonSaI(model, lr=0.02, weight_decay=0.1), warm_up_and_decay, clip=1.0)
    arguments = dict(lr=0.02, weight_decay=0.1)

    def make_loop(model):
        return trainer(MuonSaI, model, optimizer_cls_and_kwargs=(lambda: MuonSaI, arguments))

    opt = check_run_and_resume(make_loop, expected, tmp_path)
    assert {name for group in opt.param_groups if group["muon"] for name in group["param_names"]} == HIDDEN


@each_class
def test_a_subclass_that_creates_the_optimizer(cls, trainer, tmp_path):
    "`create_optimizer` of a subclass; named parameters give their names to errors."

    class Mixin:
        def create_optimizer(self, *args, **more):
            self.optimizer = build(cls, self.model)
            return self.optimizer

    def make_loop(model):
        return trainer(cls, model, Mixin)

    check_run_and_resume(make_loop, plain(lambda model: build(cls, model), warm_up_and_decay, clip=1.0), tmp_path)


@pytest.mark.parametrize(
    "cls, options",
    [
        (SGDSaI, dict(state_dtype="bfloat16")),
        (SGDSaI, dict(state_dtype="int8")),
        (Adan, dict(state_dtype="bfloat16")),
    ],
    ids=["SGDSaI-bfloat16", "SGDSaI-int8", "Adan-bfloat16"],
)
def test_few_bits_go_on_exactly(cls, options, trainer, tmp_path):
    "Trainer keeps the random state that rounding draws from, and reads the checkpoint with `weights_only=True`."
    settings = SETTINGS[cls] | options

    def make_loop(model):
        return trainer(cls, model, optimizer_cls_and_kwargs=(cls, dict(settings)))

    loop = make_loop(Net())
    loop.train()
    again = make_loop(Net(seed=9))
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{RESUME}")
    assert_same(again.model, loop.model)
    states = own(again).state.values()
    kept = {value.dtype for state in states for key, value in state.items() if key in ("momentum_buffer", "exp_avg")}
    assert kept == {getattr(torch, options["state_dtype"])}


@each_class
def test_going_on_from_adamw_is_refused(cls, trainer, tmp_path):
    "A run with AdamW cannot be resumed with another optimizer; the error says what to do, and nothing is loaded."
    trainer(torch.optim.AdamW, Net()).train()
    way = (lambda: MuonSaI, dict(SETTINGS[cls])) if cls is MuonSaI else (cls, dict(SETTINGS[cls]))
    loop = trainer(cls, Net(), optimizer_cls_and_kwargs=way)
    with pytest.raises(ValueError, match="written by torch.optim.Adam.*load only the weights"):
        loop.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{RESUME}")
    assert not own(loop).state and own(loop).param_groups[0]["lr"] != 5e-5


@pytest.mark.parametrize("way", ["an object", "a class"])
def test_errors_name_the_parameter(way, trainer):
    """A first gradient that is not finite: the names of the model where the optimizer has them, else places.

    Trainer measures the norm of all gradients by clipping them at infinity: one NaN makes all of them NaN."""
    model = Net()
    model.up.weight.register_hook(lambda g: g * torch.nan)
    named = dict(optimizers=(build(SGDSaI, model), None))
    given = named if way == "an object" else dict(optimizer_cls_and_kwargs=(SGDSaI, dict(lr=0.01)))
    loop = trainer(SGDSaI, model, **given)
    place = "up.weight" if way == "an object" else r"#1 of group 0, shape \(12, 8\)"
    with pytest.raises(RuntimeError, match=f"gradient of .*{place}.* is not finite"):
        loop.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters(), strict=True))
