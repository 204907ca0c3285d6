"""Triton's kernels for g-SNR against double precision: on a GPU, else in the interpreter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgd_sai import SGDSaI, gsnr
from sgd_sai.gsnr import gsnr_values
from sgd_sai.internals.tensor_tables import TABLE_BLOCK, triton_as_default

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [0, 1, 2, 7, 300, TABLE_BLOCK, TABLE_BLOCK + 1]


@pytest.fixture(scope="module", autouse=True)
def sums():
    "The module with the kernels; without a GPU conftest.py has asked for Triton's interpreter."
    pytest.importorskip("triton")
    from sgd_sai import triton_sums

    return triton_sums


@pytest.fixture
def by_default(triton_on_cpu):
    "Let scales be measured by the kernels."
    with triton_as_default():
        yield


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    size=st.sampled_from([1.0, 1e-3]),
    mean=st.sampled_from([0.0, 1.0]),
)
def test_sums_of_generated_tensors(sums, sizes, dtype, size, mean):
    grads = {i: (mean + size * torch.randn(n, device=DEVICE)).to(dtype) for i, n in enumerate(sizes)}
    found = sums.sums_by_triton(grads)
    assert list(found) == list(grads)
    for i, x in grads.items():
        expected = (math.fsum(x.double().tolist()), 0.0, math.fsum(x.double().square().tolist()))
        assert found[i] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_more_blocks_than_are_added_up_at_a_time(sums, monkeypatch):
    monkeypatch.setattr(sums, "_WIDTH", 2)
    grads = {0: torch.ones(4 * TABLE_BLOCK + 3, device=DEVICE), 1: torch.ones(5, device=DEVICE)}
    assert sums.sums_by_triton(grads) == {i: (len(x), 0.0, len(x)) for i, x in grads.items()}


def test_tensors_of_several_dtypes_keep_their_order(sums):
    grads = {5: torch.ones(3), 2: torch.ones(4, dtype=torch.bfloat16), 9: 2 * torch.ones(5)}
    grads = {i: x.to(DEVICE) for i, x in grads.items()}
    assert sums.sums_by_triton(grads) == {5: (3.0, 0.0, 3.0), 9: (10.0, 0.0, 20.0), 2: (4.0, 0.0, 4.0)}


@pytest.mark.parametrize("layout", ["transposed", "strided", "complex", "integers"])
def test_what_it_can_read(sums, layout):
    x = torch.randn(6, 4, device=DEVICE)
    given = {"transposed": x.T, "strided": x[:, ::2], "complex": x.to(torch.complex64), "integers": x.int()}[layout]
    assert sums.can_sum(given) == (layout == "transposed")


def test_g_snr_is_what_the_other_readers_find(by_default):
    torch.manual_seed(0)
    many = [torch.randn(n) * 1e-3 for n in (768, 768, 5, 5000, 1, 0)]
    many += [
        torch.zeros(9),
        torch.ones(700),
        3 + 1e-4 * torch.randn(500),
        torch.randn(40, 8).T,
        torch.randn(9).double(),
    ]
    many += [torch.tensor([1.0, math.inf]), torch.tensor([1.0, math.nan]), torch.randn(300).bfloat16()]
    many = [x.to(DEVICE) for x in many]
    expected = torch.stack([gsnr(x).double() for x in many])
    torch.testing.assert_close(
        torch.tensor(gsnr_values(many)).double(), expected.cpu(), rtol=1e-5, atol=0, equal_nan=True
    )


def test_a_first_step_measures_with_one_call(by_default, sums, monkeypatch):
    calls, read = [], sums.sums_by_triton
    monkeypatch.setattr(sums, "sums_by_triton", lambda grads: calls.append(len(grads)) or read(grads))
    params = [torch.nn.Parameter(torch.randn(n, device=DEVICE)) for n in (30, 700, 1)]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = SGDSaI(params, foreach=False)
    opt.step()
    opt.step()
    assert calls == [2]  # a single entry has the scale 1 without being read
    for p in params[:2]:
        assert opt.state[p]["gsnr"] == pytest.approx(gsnr(p.grad.double()).item(), rel=1e-6)
