"What a step of Adan leaves alone: gradients and memory."

import pytest
import torch
import torch._dynamo.testing
from adan_released import IMPLEMENTATIONS, each_implementation
from common import (
    LAYOUTS,
    param,
)
from torch import nn

from sgd_sai.adan import Adan
from sgd_sai.benchmarks.measuring import allocated_peak
from sgd_sai.internals.chunks import FP32_CHUNK

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@each_implementation
def test_gradients_are_left_alone(dtype, flags):
    params = [param(*shape, dtype=dtype) for shape in ((), (7,), (4, 6), (3, 4, 2, 2), (0, 3))]
    params.append(nn.Parameter(torch.randn(2, 4, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)))
    params.append(nn.Parameter(torch.randn(5, 4).to(dtype).t()))
    for variant in (
        {},
        dict(no_prox=True),
        dict(maximize=True),
        dict(restart_radius=0.01),
        dict(state_dtype=torch.float32),
    ):
        opt = Adan(params, weight_decay=0.1, **variant, **flags)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)  # contiguous, even where the parameter is not
            kept = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
            opt.step()
            for p, (grad, value, version) in zip(params, kept, strict=True):
                assert p.grad is grad and grad._version == version and torch.equal(grad, value)


ENTRIES = 1 << 22


BUDGET = 2 * 4 * 6 * FP32_CHUNK + 100_000  # float32 copies of two chunks of parameter, gradient and four states


assert BUDGET < 4 * ENTRIES  # bytes of the smallest parameter below


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kw",
    [
        *IMPLEMENTATIONS.values(),
        dict(foreach=False, no_prox=True, maximize=True),
        dict(foreach=False, betas=(0.9, 0.0, 0.9)),
        dict(foreach=True, no_prox=True, maximize=True),
        dict(capturable=True, no_prox=True, foreach=False),
    ],
    ids=str,
)
def test_step_allocates_nothing_of_parameter_size(dtype, kw):
    n = ENTRIES if dtype == torch.float32 else 2 * ENTRIES
    p = nn.Parameter(torch.empty(2048, n // 2048, dtype=dtype).uniform_(-1, 1))
    p.grad = torch.empty_like(p).uniform_(-1, 1)
    opt = Adan([p], weight_decay=0.1, **kw)
    opt.step()
    assert allocated_peak(opt.step) <= BUDGET


@pytest.mark.parametrize("flags", [dict(foreach=False), dict(foreach=True)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_step_allocates_nothing_of_parameter_size_in_any_memory_layout(flags, layout):
    p = nn.Parameter(layout[0](torch.empty(512, ENTRIES // (512 * 16), 4, 4).uniform_(-1, 1)))
    p.grad = layout[1](p.detach().clone(memory_format=torch.contiguous_format))
    opt = Adan([p], weight_decay=0.1, **flags)
    opt.step()
    assert allocated_peak(opt.step) <= BUDGET
