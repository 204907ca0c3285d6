"""`torch.compile(opt.step)` with the real compiler.

The same numbers, one kernel per tensor on the CPU, no new compilation when a tensor lr changes."""

import shutil

import pytest
import torch
from common import param, twin
from torch import nn

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="the compiler needs a C++ compiler"
    ),
]


def test_one_kernel_per_tensor_and_the_same_numbers():
    import torch._dynamo
    import torch._inductor.metrics as metrics

    shapes = [(300, 200), (64, 3, 3, 3), (77,)]
    params = [param(*s) for s in shapes]
    twins = [twin(p) for p in params]
    eager, opt = (SGDSaI(ps, lr=torch.tensor(0.01), weight_decay=0.1) for ps in (params, twins))
    torch._dynamo.reset()
    metrics.reset()
    compiled = torch.compile(opt.step)
    for t in range(5):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone() if q.grad is None else q.grad.copy_(p.grad)
        for each in (eager, opt):
            each.param_groups[0]["lr"].fill_(0.01 / (t + 1))
        eager.step()
        (opt.step if t == 0 else compiled)()  # the first step measures, outside of the graph
        if t == 1:
            kernels = metrics.generated_kernel_count
    assert kernels == len(shapes) == metrics.generated_kernel_count
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(eager.state[p]["momentum_buffer"], opt.state[q]["momentum_buffer"])


@pytest.mark.parametrize(
    "make",
    [
        lambda net: AdaHessian(net.named_parameters(), lr=0.05, update_period=2),
        lambda net: Adan(net.named_parameters(), lr=0.01, weight_decay=0.1),
        lambda net: Adan(net.named_parameters(), lr=0.01, state_dtype=torch.bfloat16),
        MuonSaI,
    ],
    ids=["AdaHessian", "Adan", "Adan, bfloat16 averages", "MuonSaI"],
)
def test_other_steps_can_be_called_through_the_compiler(make):
    "Whatever of them is traced: the numbers are those of the ordinary step."
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
        opt = make(net)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for t in range(4):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
            opt.zero_grad()
            net(x).square().mean().backward(create_graph=isinstance(opt, AdaHessian) and opt.needs_graph())
            step()
        ends.append([p.detach().clone() for p in net.parameters()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
