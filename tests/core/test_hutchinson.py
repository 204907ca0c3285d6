"The estimate of the Hessian's diagonal: its error, its random signs, and its averages over space."

import pytest
import torch
from adahessian_shared import coming_signs, plain_blocks, plain_windows
from common import (
    param,
)
from torch import nn

from sgd_sai.adahessian import AdaHessian
from sgd_sai.hutchinson import hutchinson_diagonal, spatial_average

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]


@pytest.mark.parametrize("size", [2, 3, 4, 7, 12, 24, 100])
@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (1, 3), (24, 1)], ids=str)
def test_block_averages_equal_a_plain_loop(shape, size):
    D = torch.randn(shape)
    torch.testing.assert_close(spatial_average(D, size), plain_blocks(D.abs(), size).float())
    torch.testing.assert_close(spatial_average(D, size, signed=True), plain_blocks(D, size).abs().float())


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 3, 2), (2, 3, 2, 1, 3)], ids=str)
def test_window_averages_equal_a_plain_loop(shape):
    D = torch.randn(shape)
    torch.testing.assert_close(spatial_average(D, block_size=4), plain_windows(D.abs()).float())
    torch.testing.assert_close(spatial_average(D, signed=True), plain_windows(D).abs().float())
    assert torch.equal(spatial_average(D, window=False), D.abs())


def test_tensors_without_blocks_or_windows_are_not_averaged():
    for D in (torch.tensor(-2.0), torch.randn(5), torch.randn(3, 4), torch.zeros(0, 3)):
        assert torch.equal(spatial_average(D), D.abs()) and torch.equal(spatial_average(D, signed=True), D.abs())
    for D in (torch.tensor(-2.0), torch.randn(5), torch.zeros(0, 3)):
        assert torch.equal(spatial_average(D, block_size=4), D.abs())


def test_error_of_the_estimate_falls_as_one_over_the_root_of_the_number_of_draws():
    A = torch.randn(30, 30, dtype=torch.float64)
    H = A + A.T
    x = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    generator, counts, errors = torch.Generator().manual_seed(0), [1, 4, 16, 64], []
    for n in counts:
        squares = []
        for _ in range(150):
            (g,) = torch.autograd.grad(x @ H @ x / 2, x, create_graph=True)
            (estimate,) = hutchinson_diagonal(
                [g],
                [x],
                n,
                lambda p: torch.empty_like(p, requires_grad=False).bernoulli_(0.5, generator=generator).mul_(2).sub_(1),
            )
            squares.append((estimate - H.diagonal()).square().sum())
        errors.append(torch.stack(squares).mean().sqrt().item())
    variance = (
        H.square().sum() - H.diagonal().square().sum()
    ).item()  # of one draw, summed over the entries: the squares beside the diagonal
    assert errors == pytest.approx([(variance / n) ** 0.5 for n in counts], rel=0.05)
    slope = torch.tensor(errors[-1] / errors[0]).log() / torch.tensor(counts[-1] / counts[0]).log()
    assert slope == pytest.approx(-0.5, abs=0.02)


def test_estimate_frees_the_graph_of_the_gradients():
    p = param(3)
    (g,) = torch.autograd.grad(p.pow(3).sum(), p, create_graph=True)
    hutchinson_diagonal([g], [p], 3)
    with pytest.raises(RuntimeError, match="a second time"):
        hutchinson_diagonal([g], [p])


def test_signs_are_fair_and_differ_between_steps_groups_and_parameters():
    params = [param(100, 100) for _ in range(3)]
    opt, drawn = AdaHessian([{"params": params[:2]}, {"params": params[2:]}]), []
    for _ in range(2):
        for p in params:
            p.grad = (p * p).requires_grad_()
        drawn += list(coming_signs(opt)[0].values())
        opt.step()
    for i, z in enumerate(drawn):
        assert set(z.unique().tolist()) == {-1.0, 1.0} and abs(z.mean()) < 0.05
        assert all(abs((z * other).mean()) < 0.05 for other in drawn[:i])


def test_number_of_samples_is_the_number_of_draws(monkeypatch):
    calls = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    for n in (1, 3):
        p, q = param(30), param(4)
        opt = AdaHessian([{"params": [p], "n_samples": n}, {"params": [q]}])
        (p.sum() ** 2 + q.pow(2).sum()).backward(create_graph=True)
        opt.step()
        assert len(calls) == n
        calls.clear()
    # more draws, less noise: the Hessian is 2 everywhere, so one draw is off by about 2 sqrt(29)
    errors = []
    for n in (1, 100):
        p = nn.Parameter(torch.zeros(30))
        opt = AdaHessian([p], betas=(0.9, 0.0), n_samples=n, signed_average=True)
        (p.sum() ** 2).backward(create_graph=True)
        opt.step()
        errors.append((opt.state[p]["exp_hessian_diag_sq"].sqrt() - 2).square().mean().sqrt().item())
    assert errors[1] < 0.3 * errors[0]
