"What the tests of PyTorch's contract (test_torch_*.py) share: marks, devices, small problems, comparisons."

from functools import partial

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_utils import TestCase
from torch_kinds import ADAHESSIAN, ADAMS, ADAN, MUON_KINDS, SGDSAI, SIGN

contract = [
    pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]


CHECK = TestCase()  # for assertEqual, with PyTorch's tolerances


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one GPU")]


each_device = pytest.mark.parametrize("device", ["cpu", CUDA])


only_cuda = pytest.mark.parametrize("device", [CUDA])


only_cpu = pytest.mark.parametrize("device", ["cpu"])


def kinds(*chosen):
    return pytest.mark.parametrize("kind", chosen, ids=lambda kind: kind.cls.__name__)


each_kind = kinds(SGDSAI, ADAN, ADAHESSIAN, *MUON_KINDS)


with_number = kinds(*(kind for kind in (SGDSAI, ADAN, ADAHESSIAN, *MUON_KINDS) if kind.number))


with_foreach = kinds(SGDSAI, ADAN)


with_foreach_or_partly = kinds(SGDSAI, ADAN, *MUON_KINDS)  # for all parameters, or for those that are no matrices


with_complex = kinds(SGDSAI, ADAN, SIGN, ADAMS)


def problem(kind, device, dtype=torch.float32, contiguous=True, bias_device=None):
    "weight, bias, and a function that fills their gradients and returns the loss."
    if contiguous:
        weight, bias = (
            Parameter(torch.randn(10, 5, device=device, dtype=dtype)),
            Parameter(torch.randn(10, device=bias_device or device, dtype=dtype)),
        )
    else:
        weight = Parameter(torch.randn(10, 5, 2, device=device, dtype=dtype)[..., 0])
        bias = Parameter(torch.randn(10, 2, device=device, dtype=dtype)[..., 0])
    x = torch.randn(5, device=device, dtype=dtype)
    return weight, bias, partial(evaluate, kind, weight, bias, x)


def evaluate(kind, weight, bias, x):
    weight.grad = bias.grad = None
    loss = (weight.mv(x).to(bias.device) + bias).pow(2).sum()
    kind.backward(loss)
    return loss


def assert_right_direction(before, after, given):
    assert after > before if given.kwargs.get("maximize") else after < before, f"{given.desc}: from {before} to {after}"


def snapshot(opt, params):
    "Parameters and state as one structure that assertEqual can compare."
    return [p.detach().clone() for p in params], [
        {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state[p].items()} for p in params
    ]


def small_net(dtype, device):
    torch.manual_seed(1)
    layers = torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    return torch.nn.Sequential(*layers).to(dtype=dtype, device=device)


def rounding_of(value):
    """Tolerance for 16-bit tensors, PyTorch's own for others.

    The fused kernel rounds after the decay and after the update, the loop once: an entry that happens to end near zero
    is off by a rounding of what it was made of. (PyTorch sees it less, with its ten times smaller steps.)"""
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float16, torch.bfloat16) or not value.numel():
        return {}
    eps = torch.finfo(value.dtype).eps
    return dict(rtol=2 * eps, atol=eps * value.abs().max().item())


def compare_between(inputs, models, opts, **tolerance):
    "Seven steps of several optimizers, the state and parameters of all set to those of the first after every step."
    for i in range(7):
        for x, model, opt in zip(inputs, models, opts, strict=True):
            opt.zero_grad()
            if i in (3, 5):
                model[2].requires_grad_(i == 5)  # frozen for two steps
            if i != 2:  # no gradients at all in this step
                model(x).sum().backward()
            opt.step()
        for model, opt in zip(models[1:], opts[1:], strict=True):
            for p, q in zip(models[0].parameters(), model.parameters(), strict=True):
                CHECK.assertEqual(q, p, exact_device=False, **(tolerance or rounding_of(p)))
                assert opts[0].state[p].keys() == opt.state[q].keys()
                with torch.no_grad():
                    q.copy_(p)
                for key, value in opts[0].state[p].items():
                    CHECK.assertEqual(opt.state[q][key], value, exact_device=False, **(tolerance or rounding_of(value)))
                    if isinstance(value, torch.Tensor):
                        opt.state[q][key].copy_(value)
        assert opts[0].state


def derived_optimizers(kind, device, dtype, flag, **tolerance):
    for given in kind.inputs(device):
        if flag == "fused" and given.kwargs.get("capturable"):
            continue  # refused at construction, see test_errors
        models, opts = [], []
        x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype, device=device).reshape(3, 2)
        for value in (False, True):
            model = small_net(dtype, device)
            scalar = torch.rand((), device=device, dtype=dtype, requires_grad=True)
            empty = torch.rand((0, 3), device=device, dtype=dtype, requires_grad=True)
            for p in (scalar, empty):
                p.grad = torch.rand_like(p)
            opts.append(kind.cls([*model.parameters(), scalar, empty], **{**given.kwargs, **kind.loop, flag: value}))
            models.append(model)
        compare_between([x, x], models, opts, **tolerance)
