"Kinds of tensors: sparse gradients, complex parameters, mixed dtypes and devices, another default dtype."

import pytest
import torch
from torch.nn import Parameter
from torch_contract import CHECK, TWO_GPUS, contract, derived_optimizers, each_device, each_kind, snapshot, with_complex
from torch_kinds import ADAMS, ADAN, ROW_NORM, SGDSAI, SIGN

from sgd_sai.init_scales import init_scales

pytestmark = contract


@each_kind
@each_device
@pytest.mark.parametrize("with_lrsched", [True, False])
def test_rosenbrock_sparse(kind, device, with_lrsched):
    for given in kind.all_inputs(device):
        p = Parameter(torch.tensor([1.5, 1.5], device=device))
        opt = kind.cls([("point", p)], **given.kwargs)
        if with_lrsched:
            for make in kind.schedulers[0]:
                make(opt)
        for _ in range(2):
            p.grad = torch.sparse_coo_tensor([[0, 0]], [0.3, 0.7], (2,), device=device)
            before = p.detach().clone()
            with pytest.raises(
                RuntimeError,
                match=f"{kind.cls.__name__} does not support sparse gradients, "
                "which parameter point has: build its layer",
            ):
                opt.step()
            assert torch.equal(p, before)
            kind.give(p, torch.tensor([0.3, -0.7], device=device))
            opt.step()
            assert not torch.equal(p, before)


def real_twins(params):
    return [
        torch.view_as_real(p).detach().clone().requires_grad_()
        if p.is_complex()
        else p.detach().clone().requires_grad_()
        for p in params
    ]


def give_scales(opt, other, params):
    "The scales that SGDSaI measures for `params`, given to the parameters of another, in their order."
    init_scales(opt)
    other.set_scales({name: float(opt.state[p]["gsnr"]) for (name, _), p in zip(other.named(), params, strict=True)})


@with_complex
@each_device
def test_complex(kind, device):
    for given in kind.all_inputs(device, skip=("differentiable",) + ("fused",) * (kind is SGDSAI)):
        shapes = [
            ((10, 5), torch.complex64),
            ((10,), torch.complex64),
            ((10, 5), torch.float32),
        ]  # the last is real, so that they are mixed
        params = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape, dtype in shapes]
        twins = real_twins(params)
        opt, opt_r = kind.cls(params, **given.kwargs), kind.cls(twins, **given.kwargs)
        for t in range(3):
            for p, q in zip(params, twins, strict=True):
                q.grad = torch.randn_like(q)
                p.grad = torch.view_as_complex(q.grad.clone()) if p.is_complex() else q.grad.clone()
            if t == 0 and kind is SGDSAI:
                give_scales(opt, opt_r, params)
                if given.kwargs.get("scale") != "sqrt_numel":  # n moduli, and the standard deviation of complex numbers
                    for p in params:
                        eps = given.kwargs.get("eps", 1e-8)
                        assert float(opt.state[p]["gsnr"]) == pytest.approx(
                            (p.grad.norm() / (p.grad.std() + eps)).item(), rel=1e-5
                        )
                assert all(float(opt.state[p]["gsnr"]) <= 1.5 * p.numel() ** 0.5 for p in params)
            opt.step(), opt_r.step()
            CHECK.assertEqual([torch.view_as_real(p) if p.is_complex() else p for p in params], twins, msg=given.desc)
            CHECK.assertEqual(
                [opt_r.state[q].get(kind.average) for q in twins],
                [
                    torch.view_as_real(m) if m is not None and m.is_complex() else m
                    for m in (opt.state[p].get(kind.average) for p in params)
                ],
            )


def rosenbrock(point):
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@with_complex
@each_device
def test_complex_2d(kind, device):
    for given in kind.all_inputs(device, skip=("differentiable",) + ("fused",) * (kind is SGDSAI)):
        a = torch.randn(2, device=device, dtype=torch.complex64, requires_grad=True)
        re_, im = a.real.detach().clone().requires_grad_(), a.imag.detach().clone().requires_grad_()
        kwargs = {**given.kwargs, "lr": 1e-5}
        opt, parts = kind.cls([a], **kwargs), kind.cls([re_, im], **kwargs)
        for t in range(3):
            opt.zero_grad(), parts.zero_grad()
            rosenbrock(a).abs().backward()
            with torch.no_grad():
                re_.copy_(a.real), im.copy_(a.imag)  # rounding must not add up through the steep function
            rosenbrock(torch.complex(re_, im)).abs().backward()
            CHECK.assertEqual(a.grad.real, re_.grad)
            CHECK.assertEqual(a.grad.imag, im.grad)
            re_.grad, im.grad = a.grad.real.clone(), a.grad.imag.clone()
            if t == 0 and kind is SGDSAI:
                give_scales(opt, parts, [a, a])
            opt.step(), parts.step()
            CHECK.assertEqual(a.real, re_)
            CHECK.assertEqual(a.imag, im)


DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "kind, impl",
    [
        *((kind, "foreach") for kind in (SGDSAI, ADAN, SIGN, ROW_NORM, ADAMS)),
        (SGDSAI, "fused"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.cls.__name__,
)
@pytest.mark.parametrize(
    "devices",
    [["cpu"], pytest.param(["cuda:0"], marks=pytest.mark.gpu), pytest.param(["cuda:0", "cuda:1"], marks=TWO_GPUS)],
    ids=str,
)
def test_mixed_device_dtype(kind, devices, impl):
    params = [
        torch.rand(2, 3, dtype=dtype, device=device, requires_grad=True) for device in devices for dtype in DTYPES
    ]
    grads = [torch.rand_like(p) for p in params]
    for given in kind.inputs(devices[0]):
        if impl == "fused" and given.kwargs.get("capturable"):
            continue
        results = []
        for use in (False, True):
            clones = [p.detach().clone().requires_grad_() for p in params]
            opt = kind.cls(clones, **{**given.kwargs, impl: use})
            for _ in range(7 if impl == "foreach" else 1):
                for p, g in zip(clones, grads, strict=True):
                    p.grad = g.clone()
                opt.step()
            results.append(snapshot(opt, clones))
        for p, q, s, t in zip(*results[0][:1], *results[1][:1], results[0][1], results[1][1], strict=True):
            rtol, atol = torch.testing._comparison.get_tolerances(p.dtype, rtol=None, atol=None)
            CHECK.assertEqual(q, p, rtol=5 * rtol, atol=5 * atol)
            CHECK.assertEqual(t, s, rtol=5 * rtol, atol=5 * atol)


@each_kind
@each_device
def test_set_default_dtype_works_with_foreach(kind, device):
    before = torch.get_default_dtype()
    for default in (torch.float64, torch.float16):
        try:
            torch.set_default_dtype(default)
            if "foreach" in kind.supports:
                derived_optimizers(
                    kind,
                    device,
                    torch.float64,
                    "foreach",
                    **(dict(atol=1e-5, rtol=1e-4) if default == torch.float16 else {}),
                )
            p = Parameter(torch.randn(3, 2, dtype=torch.float32, device=device))
            kind.give(p, torch.randn_like(p))
            opt = kind.cls([p], **(dict(capturable=True) if kind.capturable else {}))
            opt.step()
            assert opt.state[p][kind.average].dtype == torch.float32
            if kind.number in opt.state[p]:  # a matrix of MuonSaI has none
                count_dtype = torch.float64 if default == torch.float64 and kind is not SGDSAI else torch.float32
                assert opt.state[p][kind.number].dtype == count_dtype  # counts follow the default dtype, as in PyTorch
        finally:
            torch.set_default_dtype(before)
