"""What several test files share: small models with the gradients of training them, runs that feed given gradients,
copies of an optimizer by pickle, deepcopy and state_dict, memory layouts, processes."""

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.optim import SGD

STEPS, TOLERANCE = 20, 1e-6


def param(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(shape).to(dtype))


def twin(p):
    return nn.Parameter(p.detach().clone())


def noise(p, n, scale=1.0):
    return [torch.randn(p.shape).to(p.dtype) * scale for _ in range(n)]


def steps(opt, params, *grads):
    "One step for each item of `grads`, which is a list with a gradient, or None, for every parameter."
    for gs in grads:
        for p, g in zip(params, gs, strict=True):
            p.grad = None if g is None else g.clone()
        opt.step()


class ConvNet(nn.Sequential):
    "Convolutions with and without bias, batch norm, a linear layer: 10 classes from 12x12 pictures."

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )

    @staticmethod
    def batch():
        return torch.randn(8, 3, 12, 12), torch.randint(10, (8,))


class TransformerBlock(nn.Module):
    "Embedding, one pre-norm block with two heads, a head that predicts the token itself."

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.block = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(16, 20)

    def forward(self, x):
        return self.head(self.block(self.embed(x))).transpose(1, 2)

    @staticmethod
    def batch():
        return torch.randint(20, (4, 12)), torch.randint(20, (4, 12))


def same_start(model_class):
    torch.manual_seed(0)
    return model_class()


def recorded_gradients(model_class):
    """The gradients of 20 steps of training.

    All optimizers are given the same: a model that trains itself would amplify the rounding of its processor."""
    torch.manual_seed(1)
    batches = [model_class.batch() for _ in range(STEPS)]
    model, grads = same_start(model_class), []
    opt = SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        opt.step()
    return grads


def train(model, step, grads):
    "The parameters after each step."
    path = []
    for given in grads:
        for p, g in zip(model.parameters(), given, strict=True):
            p.grad = g.to(p.dtype, copy=True)
        step()
        path.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return path


def assert_same_path(mine, theirs):
    "Equal to 1e-6 of the largest entry of each tensor after each step, and something happened."
    assert len(mine) == len(theirs)
    for t, (p, q) in enumerate(zip(mine, theirs, strict=True)):
        for name in q:
            off = (p[name].double() - q[name]).abs().max() / q[name].abs().max()
            assert off <= TOLERANCE, f"step {t}, {name}: off by {off:.1e}"
    for name in theirs[0]:
        assert (theirs[-1][name] - theirs[0][name]).abs().max() > 1e3 * TOLERANCE * theirs[-1][name].abs().max()


def through_pickle(opt, params):
    "A copy of optimizer and parameters, as from a process that was saved with pickle and started again."
    return pickle.loads(pickle.dumps((opt, params)))


def through_deepcopy(opt, params):
    return copy.deepcopy((opt, params))


def through_state_dict(opt, params):
    "New parameters and a new optimizer with default settings, which load everything from a file."
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [nn.Parameter(p) for p in saved["params"]]
    groups = [{"params": [params[i] for i in group["params"]]} for group in saved["opt"]["param_groups"]]
    new = type(opt)(groups)
    new.load_state_dict(saved["opt"])
    return new, params


each_travel = pytest.mark.parametrize("travel", [through_pickle, through_deepcopy, through_state_dict])


MEMORY_FORMATS = {
    "plain": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}

LAYOUTS = {  # of a 4-D parameter, and of its gradient
    "channels_last": (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.contiguous(memory_format=torch.channels_last),
    ),
    "transposed": (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),) * 2,
    "gradient laid out otherwise": (lambda t: t, lambda t: t.contiguous(memory_format=torch.channels_last)),
    "with gaps": (lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t),
}


def peak_of_new_memory(f):
    "Bytes that calling `f` allocates at most at one time."
    from sgd_sai.benchmarks.measuring import allocated_peak

    return allocated_peak(f)


def on_processes(count, target, folder):
    "What `target(rank, store, out)` saves to the file `{out}.{rank}` in each of so many processes."
    store, out = str(folder / "store"), str(folder / "out")
    context = mp.spawn(target, (store, out), nprocs=count, join=False)
    try:
        for _ in range(120):
            if context.join(timeout=1):
                break
        else:
            pytest.fail(f"{count} processes with gloo did not come to an end in two minutes")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(f"{out}.{rank}") for rank in range(count)]


def on_two_processes(target, folder):
    "What `target(rank, store, out)` saves to the file `{out}.{rank}` in each of two processes."
    return on_processes(2, target, folder)
