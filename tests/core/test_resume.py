"A run that stops after any of 30 steps, is saved to a file, built anew and goes on, is the straight run, bit for bit"

import io

import pytest
import torch
from torch import nn

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI

STEPS, FROZEN_UNTIL = 30, 7
OPTIMIZERS = {  # not the defaults only: what keeps most state
    "SGDSaI": lambda net: SGDSaI(net.named_parameters(), lr=2e-3),
    "SGDSaI, float32 momentum": lambda net: SGDSaI(
        net.named_parameters(), lr=2e-3, state_dtype=torch.float32, nesterov=True
    ),
    "SGDSaI, 8-bit momentum": lambda net: SGDSaI(
        net.named_parameters(), lr=2e-3, state_dtype=torch.int8, rounding="stochastic"
    ),
    "Adan": lambda net: Adan(net.named_parameters(), lr=1e-2, weight_decay=0.02, restart_radius=1.0),
    "AdaHessian": lambda net: AdaHessian(net.named_parameters(), lr=0.05, update_period=3),
    "MuonSaI": lambda net: MuonSaI(net),
}


def built(make, dtype, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    opt = make(net)
    return net, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)


def one_step(net, opt, schedule, step):
    net[2].requires_grad_(step >= FROZEN_UNTIL)
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
    opt.zero_grad()
    loss = nn.functional.cross_entropy(net(x.to(net[0].weight.dtype)).float(), y)
    loss.backward(create_graph=isinstance(opt, AdaHessian) and opt.needs_graph())
    opt.step()
    schedule.step()
    return loss.item(), [p.detach().clone() for p in net.parameters()]


def saved(*parts):
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_at_every_step(name, dtype):
    torch.set_num_threads(1)
    parts = built(OPTIMIZERS[name], dtype, 0)
    files, straight = [], []
    for step in range(STEPS):
        files.append(saved(*parts))  # before the step: the first is a checkpoint of a run that has not begun
        straight.append(one_step(*parts, step))
    assert not all(torch.equal(a, b) for a, b in zip(straight[0][1], straight[-1][1], strict=True))
    for start, file in enumerate(files):
        again = built(OPTIMIZERS[name], dtype, 100 + start)
        file.seek(0)
        for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        for step in range(start, STEPS):
            loss, params = one_step(*again, step)
            assert loss == straight[step][0], (start, step)
            assert all(torch.equal(p, q) for p, q in zip(params, straight[step][1], strict=True)), (start, step)
