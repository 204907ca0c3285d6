"`torch.compile(opt.step)` with the real compiler: the same numbers, one kernel per tensor on the CPU, no new compilation when a tensor lr changes."
import shutil

import pytest
import torch
from common import param, twin

from sgd_sai.optimizer import SGDSaI

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the compiler needs a C++ compiler")]


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
        for p, q in zip(params, twins):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone() if q.grad is None else q.grad.copy_(p.grad)
        for each in (eager, opt):
            each.param_groups[0]["lr"].fill_(0.01 / (t + 1))
        eager.step()
        (opt.step if t == 0 else compiled)()  # the first step measures, outside of the graph
        if t == 1: kernels = metrics.generated_kernel_count
    assert kernels == len(shapes) == metrics.generated_kernel_count
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(eager.state[p]["momentum_buffer"], opt.state[q]["momentum_buffer"])
