"The sums from which g-SNR is read in one pass: where they would cancel, in what order, and on the edges."

import math
import sys

import pytest
import torch

from sgd_sai.gsnr import _moments_of_sums, _shard_sums, gsnr_values, norm_mean_std
from sgd_sai.gsnr import gsnr as gsnr_of
from sgd_sai.scale_rules import measure_scales

pytestmark = pytest.mark.usefixtures("seeded")


def exact(grad, eps=1e-8, correction=1):
    "G in double precision, in two passes."
    x = grad.double().flatten()
    std = ((x - x.mean()).abs().square().sum() / (len(x) - correction)).sqrt()
    return (x.norm() / (std + min(eps, 1e-3 * x.norm().item() / math.sqrt(len(x))))).item()


NEARLY_CONSTANT = {  # what is small beside the mean cancels in a difference of two sums
    "one tensor": [(5000,)],
    "two blocks": [((1 << 20) + 5000,)],
    "stacked": [(768,)] * 3,
    "small": [(5,), (5,)],
}


@pytest.mark.parametrize("dtype, spread", [(torch.float32, 1e-2), (torch.float32, 1e-4), (torch.float64, 1e-5)])
@pytest.mark.parametrize("shapes", NEARLY_CONSTANT.values(), ids=NEARLY_CONSTANT)
def test_spread_around_a_large_mean_is_not_lost(shapes, dtype, spread):
    grads = [(1 + spread * torch.randn(shape, dtype=torch.float64)).to(dtype) for shape in shapes]
    expected = pytest.approx([exact(grad) for grad in grads], rel=2e-3)
    assert [gsnr_of(grad).item() for grad in grads] == expected
    assert gsnr_values(grads) == expected
    for grad in grads:
        norm, mean, std = norm_mean_std(grad)
        assert std.item() == pytest.approx(grad.double().std().item(), rel=2e-3)
        sums = _moments_of_sums(_shard_sums(grad), grad.numel(), 1)
        assert sums[2].item() == pytest.approx(grad.double().std().item(), rel=2e-3)


def test_order_of_many_tensors(monkeypatch):
    "Stacked ones, in several stacks, between large ones and odd ones: each keeps its own number."
    monkeypatch.setattr(sys.modules["sgd_sai.gsnr"], "_BLOCK", 8192)  # the package has a function of this name
    shapes = [(600,), (30, 20), (5000,), (7,), (600,), (1,), (7,)] * 9
    grads = [torch.randn(shape) + 0.05 * i for i, shape in enumerate(shapes)]
    grads[10], grads[20], grads[30] = grads[10].double(), grads[20].bfloat16(), torch.zeros(7)
    G = gsnr_values(grads)
    one_by_one = [gsnr_of(grad).item() for grad in grads]
    assert G == pytest.approx(one_by_one, rel=1e-5)
    of_one_size = [G[i] for i, shape in enumerate(shapes) if shape == (600,)]
    assert len({round(value, 3) for value in of_one_size}) == len(of_one_size)  # no two are alike


def test_sums_of_one_entry():
    "Its spread is 0 and not 0 / 0, alone and beside other tensors."
    for moments in (_moments_of_sums([2.0, 0.0, 4.0], 1, 1), _moments_of_sums([[2.0, 0.0, 4.0]] * 2, [1, 1], 1)):
        assert [x.flatten()[0].item() for x in moments] == [2, 2, 0]
    norm, mean, std = _moments_of_sums([[2.0, 0.0, 4.0], [2.0, 0.0, 4.0]], [1, 2], 1)
    assert norm.tolist() == [2, 2] and mean.tolist() == [2, 1] and std.tolist() == [0, math.sqrt(2)]


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_one_entry_has_a_gsnr_of_one(dtype, correction):
    one, zero, empty = (torch.full(shape, value).to(dtype) for shape, value in (((1,), 3.0), ((), 0.0), ((0, 3), 0.0)))
    assert gsnr_values([one, zero, empty, one[0]], correction=correction) == [1, 0, 0, 1]
    assert [gsnr_of(g, correction=correction).item() for g in (one, zero, empty, one[0])] == [1, 0, 0, 1]


def test_complex_sums():
    "The modulus of the mean, and the spread around the mean of both parts."
    z = torch.complex(torch.randn(500) + 1, torch.randn(500) - 2)
    norm, mean, std = _moments_of_sums(_shard_sums(z), 500, 1)
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(z).item(), rel=1e-5)
    assert mean.item() == pytest.approx(z.mean().abs().item(), rel=1e-5)
    assert std.item() == pytest.approx(z.std().item(), rel=1e-5)
    assert gsnr_of(z).item() == pytest.approx((norm / std).item(), rel=1e-5)


@pytest.mark.parametrize("scale, eps", [(1e-25, 1e-8), (1e-30, 1e-30), (1e25, 1e24), (1e30, 1e-8)])
def test_rescue_of_squares_out_of_range_keeps_eps_in_the_unit_of_the_gradient(scale, eps):
    "A gradient whose squares leave the range of float32 is divided by its largest entry, and so is eps."
    grad = torch.randn(100) * scale
    assert measure_scales([grad], eps=eps, max_ratio=None) == [pytest.approx(exact(grad, eps), rel=1e-5)]


def test_eps_is_bounded_by_the_size_of_the_gradient():
    grad = torch.randn(5000)
    for scale, eps in ((1.0, 1e-8), (1.0, 1e-2), (1e-6, 1e-8), (1e-12, 1e-8)):
        assert gsnr_of(grad * scale, eps).item() == pytest.approx(exact(grad * scale, eps), rel=1e-6)
        assert gsnr_values([grad * scale, grad[:50] * scale], eps)[0] == pytest.approx(
            exact(grad * scale, eps), rel=1e-6
        )


@pytest.mark.parametrize("shape", [(3,), (50,), (5000,)], ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_entry_that_is_not_finite_makes_it_nan(shape, bad):
    grad = torch.randn(shape)
    grad[1] = bad
    assert gsnr_of(grad).isnan() and math.isnan(gsnr_values([grad, torch.randn(shape)])[0])
