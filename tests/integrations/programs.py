"""What the tests of this folder share: one small model, its batches, and the plain loop to compare a program with."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI

WORDS, BATCH, STEPS, RESUME = 13, 4, 6, 3
SETTINGS = {
    SGDSaI: dict(lr=0.01),
    Adan: dict(lr=0.01),
    AdaHessian: dict(lr=0.05),
    MuonSaI: dict(lr=0.02),
}
DECAYED = {"embed.weight", "up.weight", "down.weight", "head.weight"}  # by programs that spare gains and biases
HIDDEN = {"up.weight", "down.weight"}  # the matrices that Muon takes


class Net(nn.Module):
    "Maps every word to another one. The forward pass returns the loss, as Trainer wants it."

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm = nn.Embedding(WORDS, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, WORDS)
        self.passes = 0

    def forward(self, x, labels):
        self.passes += 1
        h = self.embed(x)
        h = h + self.down(torch.tanh(self.up(self.norm(h))))
        return {"loss": cross_entropy(self.head(h).flatten(0, 1), labels.flatten())}


TRAINER = dict(  # arguments of a Trainer that trains this model and says nothing
    per_device_train_batch_size=BATCH,
    max_steps=STEPS,
    save_steps=RESUME,
    lr_scheduler_type="linear",
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
    dataloader_pin_memory=False,
    logging_strategy="no",
)


def lightning_module(lightning):
    "The model as a class for Lightning, without an optimizer."

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, given, index):
            return self.net(*batch(self.global_step))["loss"]

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(STEPS))

    return Module


def batch(step):
    "Words, (BATCH, 6), and the words that they are to be mapped to."
    x = torch.randint(WORDS, (BATCH, 6), generator=torch.Generator().manual_seed(step))
    return x, (3 * x + 1) % WORDS


def items(steps=STEPS):
    "The same batches one item at a time, to be read in order."
    return [dict(x=x, labels=y) for step in range(steps) for x, y in zip(*batch(step), strict=True)]


def trainable(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def build(cls, model, **more):
    "The optimizer as a plain loop builds it: from the names, MuonSaI from the model."
    return cls(model if cls is MuonSaI else trainable(model), **SETTINGS[cls] | more)


def decay_groups(model, weight_decay):
    "The groups that programs make: no names, no decay for gains and biases."
    return [
        dict(params=[p for name, p in trainable(model) if name in DECAYED], weight_decay=weight_decay),
        dict(params=[p for name, p in trainable(model) if name not in DECAYED], weight_decay=0.0),
    ]


def names_by(key, opt, model):
    "Names of the parameters by what their group says under `key`."
    names, found = {p: name for name, p in model.named_parameters()}, {}
    for group in opt.param_groups:
        found.setdefault(group[key], set()).update(names[p] for p in group["params"])
    return found


def train(model, opt, start=0, stop=STEPS, clip=None, after_step=lambda: None):
    "The bare loop."
    for step in range(start, stop):
        opt.zero_grad()
        model(*batch(step))["loss"].backward(create_graph=isinstance(opt, AdaHessian))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        after_step()


def plain(make, schedule=None, clip=None, steps=STEPS):
    "The model after the bare loop; `make(model)` is the optimizer, `schedule(opt)` is stepped after each step."
    model = Net()
    opt = make(model)
    schedule = schedule(opt) if schedule else None
    train(model, opt, stop=steps, clip=clip, after_step=schedule.step if schedule else lambda: None)
    return model


def assert_same(model, other):
    "Equal parameters, to the last bit, that are no longer those of the start."
    for (name, p), q, start in zip(model.named_parameters(), other.parameters(), Net().parameters(), strict=True):
        assert torch.equal(p, q), f"{name} is off by {(p - q).abs().max():.1e}"
        assert not torch.equal(p, start), f"{name} has not been trained"
