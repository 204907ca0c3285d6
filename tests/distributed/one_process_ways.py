"Ways of training in one process, each measured against the equations in the same loop. See ways.py."

import tempfile
import warnings
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from ways import OPTIMIZERS, SAVES, STEPS, UNFREEZE, Net, Way, run

from sgd_sai import Adan, SGDSaI
from sgd_sai.adan import adan_reference
from sgd_sai.sgd_sai import sgd_sai_reference


class Equations(torch.optim.Optimizer):
    "The equations, tensor by tensor."

    def __init__(self, params, reference, **settings):
        self.names, self.reference, self.settings = {}, reference, settings
        pairs = list(params)
        self.names = {p: name for name, p in pairs}
        super().__init__([p for _, p in pairs], {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.names:
            if p.grad is not None:
                p.copy_(self.reference(p.clone(), p.grad.clone(), self.state[p], **self.settings))

    def scales(self):
        return {name: self.state[p]["gsnr"] for p, name in self.names.items() if "gsnr" in self.state[p]}


REFERENCES = {SGDSaI: sgd_sai_reference, Adan: adan_reference}


class Autocast(Way):
    dtype = torch.bfloat16

    def loss(self, model, batch, graph):
        x, y = batch
        with torch.autocast("cpu", self.dtype):
            loss = cross_entropy(model(x).float(), y)
        self.backward(loss)
        return loss.detach()

    def backward(self, loss):
        loss.backward()


class Scaler(Autocast):
    "A GradScaler whose first step overflows, so that it is skipped."

    def __init__(self):
        super().__init__()
        self.scaler, self.skipped = torch.amp.GradScaler("cpu", init_scale=2.0**10), False

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, opt, model):
        if isinstance(opt, Equations):  # the equations see what has been unscaled, and nothing of the skipped step
            for group in opt.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad /= self.scaler.get_scale()
            return opt.step()
        if not self.skipped and not opt.state:
            kept = [(p, p.grad.clone()) for group in opt.param_groups for p in group["params"] if p.grad is not None]
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            scaler.scale(torch.zeros(()))
            kept[0][0].grad[..., 0] = torch.inf
            before = kept[0][0].detach().clone()
            scaler.step(opt)
            scaler.update()
            assert (
                torch.equal(before, kept[0][0]) and not opt.state and scaler.get_scale() == 2.0**9
            )  # skipped: nothing moved, no scale was set
            for p, g in kept:
                p.grad = g
            self.skipped = True
        self.scaler.step(opt)
        self.scaler.update()


class Half(Scaler):
    dtype = torch.float16


class CompiledModel(Way):
    def wrap(self, net):
        torch._dynamo.reset()
        return torch.compile(net, backend="aot_eager")


class CompiledStep(Way):
    "The first steps of each parameter run outside of the graph."

    def step(self, opt, model):
        if isinstance(opt, Equations):
            return opt.step()
        if getattr(self, "of", None) is not opt:
            torch._dynamo.reset()
            self.of, self.compiled = opt, torch.compile(opt.step, backend="eager")
        self.compiled()


class Accumulation(Way):
    def loss(self, model, batch, graph):
        total = 0.0
        for part in zip(*(column.chunk(4) for column in batch), strict=True):
            loss = cross_entropy(model(part[0]), part[1]) / 4
            loss.backward()
            total += loss.detach()
        return total


class Clipping(Way):
    def step(self, opt, model):
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        self.clipped = getattr(self, "clipped", 0) + bool(norm > 0.3)
        opt.step()


class Averaged(Way):
    "An exponential average of the weights, saved and loaded with them."

    def wrap(self, net):
        self.average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        return net

    def step(self, opt, model):
        opt.step()
        self.average.update_parameters(model)

    def save(self, model, opt, folder):
        super().save(model, opt, folder)
        torch.save(self.average.state_dict(), f"{folder}/average.pt")

    def load(self, model, opt, folder):
        super().load(model, opt, folder)
        self.average.load_state_dict(torch.load(f"{folder}/average.pt"))

    def scales(self, opt):  # the average counts as a number to be resumed
        extra = (
            {"average": float(sum(p.double().abs().sum() for p in self.average.parameters()))}
            if not isinstance(opt, Equations)
            else {}
        )
        return super().scales(opt) | extra


class Pictures(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.late, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)
        self.late.requires_grad_(False)

    def forward(self, x):
        return self.head((torch.relu(self.late(torch.relu(self.stem(x))))).mean((2, 3)))


class ChannelsLast(Way):
    def build(self, seed):
        return Pictures(seed).to(memory_format=torch.channels_last)

    def batch(self, step):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(8, 3, 8, 8, generator=g)
        return x.contiguous(memory_format=torch.channels_last), (x.mean((1, 2, 3)) > 0).long()


class Tied(Way):
    "Embedding and head share their weight, which the optimizer is given once."

    class Model(Net):
        def __init__(self, seed=0):
            super().__init__(seed)
            self.head = nn.Linear(10, 11, bias=False)
            self.head.weight = self.embed.weight

    def build(self, seed):
        return self.Model(seed)


class Meta(Way):
    "Built without memory, then filled."

    def build(self, seed):
        with torch.device("meta"):
            net = Net()
        net = net.to_empty(device="cpu")
        net.load_state_dict(Net(seed).state_dict())
        return net


ONE_PROCESS = {
    "the bare loop": Way,
    "autocast, bfloat16": Autocast,
    "autocast, bfloat16, GradScaler": Scaler,
    "autocast, float16, GradScaler": Half,
    "torch.compile of the model": CompiledModel,
    "torch.compile of opt.step": CompiledStep,
    "gradient accumulation": Accumulation,
    "gradient clipping": Clipping,
    "average of the weights (EMA)": Averaged,
    "channels-last": ChannelsLast,
    "tied weights": Tied,
    "initialisation on the meta device": Meta,
}


def measure_one(kind, name):
    "As `ways.measure_way`, against the equations in the same loop."
    make = OPTIMIZERS[name]
    equations = partial(Equations, reference=REFERENCES[make.func], **make.keywords)
    alone, expected = run(kind(), equations, STEPS)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        way = kind()
        losses, scales = run(way, make, STEPS, folder=folder, saves=SAVES)
        found = {"loss": max(abs(a - b) for a, b in zip(losses, alone, strict=True))}
        resumed = [run(kind(), make, STEPS, start=at, seed=5, unfrozen=at > UNFREEZE, folder=folder) for at in SAVES]
        found["resume"] = all(
            again == losses[at:] and same == scales for at, (again, same) in zip(SAVES, resumed, strict=True)
        )
    found["fell"] = sum(losses[:5]) / 5 - sum(losses[-5:]) / 5
    if name == "SGDSaI":
        scales.pop("average", None)
        assert scales.keys() == expected.keys(), (sorted(scales), sorted(expected))
        found["G"] = max(abs(scales[key] / expected[key] - 1) for key in expected)
        found["unfreeze"] = any("late" in key for key in scales)
    return found
