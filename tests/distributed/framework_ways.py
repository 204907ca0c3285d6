"Training by other libraries' loops, against the equations in a bare loop; network and batches are those of ways.py."

import tempfile
import warnings
from functools import partial

import torch
from one_process_ways import REFERENCES, Equations
from torch import nn
from torch.nn.functional import cross_entropy
from ways import OPTIMIZERS, STEPS, UNFREEZE, Net, Way, clean, run

from sgd_sai import SGDSaI

RESUME = 8
MAKE = OPTIMIZERS["SGDSaI"]


def equations(way=Way, lr=None):
    "Losses and scales by the equations in the bare loop; `lr(step)` is a schedule."
    way = way()
    if lr:

        def step(opt, model):
            opt.settings["lr"] = lr(step.count)
            step.count += 1
            opt.step()

        step.count, way.step = 0, step
    return run(way, partial(Equations, reference=REFERENCES[SGDSaI], **MAKE.keywords), STEPS)


def compared(straight, resumed, expected, start=RESUME):
    "The record of one way: straight run, resumed run and the equations, each (losses, scales)."
    losses, scales = straight
    scales = {clean(name.replace("net.", "").replace("_orig_mod.", "")): G for name, G in scales.items()}
    assert scales.keys() == expected[1].keys(), (sorted(scales), sorted(expected[1]))
    return {
        "G": max(abs(scales[name] / G - 1) for name, G in expected[1].items()),
        "loss": max(abs(a - b) for a, b in zip(losses, expected[0], strict=True)),
        "resume": resumed[0] == losses[start:] and resumed[1] == straight[1],
        "unfreeze": any("late" in name for name in scales),
        "fell": sum(losses[:5]) / 5 - sum(losses[-5:]) / 5,
    }


def thaw(model, step):
    "`late` trains from the tenth step on."
    for name, p in model.named_parameters():
        if "late" in name and ".base_layer." not in name:
            p.requires_grad_(step >= UNFREEZE)


# --- accelerate -------------------------------------------------------------------------------------------------------


def accelerate():
    "Accelerator: prepare, backward, save_state and load_state."
    from accelerate import Accelerator

    def train(folder, start=0):
        accelerator = Accelerator(cpu=True)
        net = Net(5 if start else 0)
        model, opt = accelerator.prepare(net, MAKE(net.named_parameters()))
        if start:
            accelerator.load_state(folder)
        losses = []
        for step in range(start, STEPS):
            thaw(model, step)
            x, y = Net.batch(step)
            loss = cross_entropy(model(x), y)
            accelerator.backward(loss)
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
            if step + 1 == RESUME and not start:
                accelerator.save_state(folder)
        return losses, opt.optimizer.scales()

    with tempfile.TemporaryDirectory() as folder:
        return compared(train(folder), train(folder, RESUME), equations())


# --- Hugging Face Trainer ---------------------------------------------------------------------------------------------


class ForTrainer(nn.Module):
    "The network in the form that Trainer wants: a dict with the loss."

    def __init__(self, seed):
        super().__init__()
        self.net = Net(seed)

    def forward(self, x, labels):
        return {"loss": cross_entropy(self.net(x), labels)}


def trainer():
    "Trainer with `optimizers=`, its checkpoint, and `resume_from_checkpoint`."
    import transformers

    class Items(torch.utils.data.Dataset):
        def __init__(self):
            self.batches = [Net.batch(step) for step in range(STEPS)]

        def __len__(self):
            return 8 * STEPS

        def __getitem__(self, i):
            x, y = self.batches[i // 8]
            return {"x": x[i % 8], "labels": y[i % 8]}

    class Ordered(transformers.Trainer):
        losses = ()

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, **more):
            thaw(model, self.state.global_step)
            loss = super().compute_loss(model, inputs, **more)
            self.losses = [*self.losses, loss.item()]
            return loss

    def train(folder, start=0):
        model = ForTrainer(5 if start else 0)
        opt = MAKE(model.named_parameters())
        arguments = transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            max_steps=STEPS,
            save_steps=RESUME,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            max_grad_norm=0,
            dataloader_pin_memory=False,
            logging_strategy="no",
        )
        loop = Ordered(
            model, arguments, train_dataset=Items(), optimizers=(opt, torch.optim.lr_scheduler.ConstantLR(opt, 1.0))
        )
        loop.train(resume_from_checkpoint=f"{folder}/checkpoint-{start}" if start else None)
        return list(loop.losses), opt.scales()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compared(train(folder), train(folder, RESUME), equations())


# --- Lightning --------------------------------------------------------------------------------------------------------


def lightning():
    "Lightning: closures, its checkpoint, and `ckpt_path`."
    import logging

    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self, seed):
            super().__init__()
            self.net, self.losses, self.evaluated = Net(seed), [], 0

        def training_step(self, batch, index):
            thaw(self.net, self.global_step)
            x, y = Net.batch(self.global_step)
            loss = cross_entropy(self.net(x), y)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return MAKE(self.net.named_parameters())

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == RESUME:
                trainer.save_checkpoint(f"{trainer.default_root_dir}/kept.ckpt")

    def train(folder, start=0):
        module = Module(5 if start else 0)
        loop = L.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[] if start else [Keep()],
        )
        loop.fit(
            module,
            torch.utils.data.DataLoader(range(STEPS), batch_size=1),
            ckpt_path=f"{folder}/kept.ckpt" if start else None,
            weights_only=False if start else None,
        )
        assert len(module.losses) == STEPS - start  # each closure was called once
        return module.losses, loop.optimizers[0].scales()

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compared(train(folder), train(folder, RESUME), equations())


# --- LoRA -------------------------------------------------------------------------------------------------------------


class Lora(Way):
    "Adapters of rank 2 on all linear layers of the blocks, B at zero; those of `late` join at step 10."

    def build(self, seed):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        return get_peft_model(Net(0), LoraConfig(r=2, target_modules=["up", "down"]))

    def unfreeze(self, model):
        thaw(model, UNFREEZE)
        return model

    def wrap(self, net):
        thaw(net, 0)
        return net


def lora():
    "peft, with the adapter's weights and the optimizer saved."
    with tempfile.TemporaryDirectory() as folder:
        straight = run(Lora(), MAKE, STEPS, folder=folder, saves=(RESUME,))
        resumed = run(Lora(), MAKE, STEPS, start=RESUME, seed=5, folder=folder)
    return compared(straight, resumed, equations(Lora))


# --- timm -------------------------------------------------------------------------------------------------------------


def timm_schedule():
    "timm's cosine with warm-up, which sets the learning rate of every group."
    from timm.scheduler import CosineLRScheduler

    lr, seen = MAKE.keywords["lr"], []

    class Scheduled(Way):
        def step(self, opt, model):
            opt.step()
            self.count = getattr(self, "count", 0) + 1
            self.schedule.step_update(self.count)

        def optimizer(self, make, model):
            opt = super().optimizer(make, model)
            self.schedule = CosineLRScheduler(
                opt, t_initial=STEPS, lr_min=lr / 10, warmup_t=4, warmup_lr_init=lr / 4, t_in_epochs=False
            )
            return opt

        def save(self, model, opt, folder):
            super().save(model, opt, folder)
            torch.save((self.count, self.schedule.state_dict()), f"{folder}/schedule.pt")

        def load(self, model, opt, folder):
            super().load(model, opt, folder)
            self.count, state = torch.load(f"{folder}/schedule.pt")
            self.schedule.load_state_dict(state)

    def rates(step):  # of a second schedule, on an optimizer that does nothing
        if not seen:
            other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
            schedule = CosineLRScheduler(
                other, t_initial=STEPS, lr_min=lr / 10, warmup_t=4, warmup_lr_init=lr / 4, t_in_epochs=False
            )
            for t in range(STEPS):
                seen.append(other.param_groups[0]["lr"])
                schedule.step_update(t + 1)
        return seen[step]

    with tempfile.TemporaryDirectory() as folder:
        way = Scheduled()
        straight = run(way, MAKE, STEPS, folder=folder, saves=(RESUME,))
        resumed = run(Scheduled(), MAKE, STEPS, start=RESUME, seed=5, folder=folder)
    assert rates(0) == lr / 4 and rates(4) != rates(STEPS - 1)
    return compared(straight, resumed, equations(lr=rates))


FRAMEWORKS = {
    "accelerate": accelerate,
    "Hugging Face Trainer": trainer,
    "Lightning": lightning,
    "peft, LoRA": lora,
    "timm's scheduler": timm_schedule,
}
MODULES = {
    "accelerate": "accelerate",
    "Hugging Face Trainer": "transformers",
    "Lightning": "lightning",
    "peft, LoRA": "peft",
    "timm's scheduler": "timm",
}
