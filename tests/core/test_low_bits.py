"Numbers in fewer bits: roundings that are right on average, and SGDSaI with narrow momenta and parameters."

import copy
import io
import itertools
import math

import pytest
import torch
from common import MEMORY_FORMATS, param, steps, twin
from common import noise as gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sgd_sai.benchmarks.step_time import allocated_peak
from sgd_sai.internals import rounding as rounding_module
from sgd_sai.internals.rounding import BLOCK, decode, encode_, init_momentum, random_bits, stochastic_round_
from sgd_sai.sgd_sai import SGDSaI, sgd_sai_reference

pytestmark = pytest.mark.usefixtures("seeded")
FLOAT32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
FORMS = {  # dtype of the parameter, options
    "bf16 state": (FLOAT32, dict(state_dtype=BF16)),
    "int8 state": (FLOAT32, dict(state_dtype=INT8)),
    "bf16, int8 state": (BF16, dict(state_dtype=INT8)),
    "stochastic": (BF16, dict(rounding="stochastic")),
    "kahan": (BF16, dict(rounding="kahan")),
    "kahan, float16": (torch.float16, dict(rounding="kahan")),
    "kahan, int8 state": (BF16, dict(rounding="kahan", state_dtype=INT8)),
    "stochastic, no momentum": (BF16, dict(rounding="stochastic", momentum=0.0)),
    "kahan, no momentum": (BF16, dict(rounding="kahan", momentum=0.0)),
    "nearest": (FLOAT32, dict(state_dtype=BF16, rounding="nearest")),
    "int8 to nearest": (FLOAT32, dict(state_dtype=INT8, rounding="nearest")),
    "nesterov": (BF16, dict(rounding="stochastic", state_dtype=INT8, nesterov=True, maximize=True)),
}
each_form = pytest.mark.parametrize("dtype, kw", FORMS.values(), ids=FORMS)


def neighbours(x):
    "The two bfloat16 numbers around each float32."
    down = (x.view(torch.int32) & -(1 << 16)).view(FLOAT32)
    up = ((x.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(FLOAT32)
    return down, torch.where(down == x, down, up)


def test_noise_depends_on_its_key_and_on_nothing_else():
    before = torch.get_rng_state()
    first = random_bits(5000, 3, 1, 0)
    assert (
        torch.equal(torch.get_rng_state(), before)
        and first.dtype == torch.int32
        and 0 <= first.min()
        and first.max() < 65536
    )
    torch.manual_seed(17)
    assert torch.equal(random_bits(5000, 3, 1, 0), first)
    others = [random_bits(5000, *key) for key in ((4, 1, 0), (3, 2, 0), (3, 1, 1))]
    assert all((first == other).float().mean() < 0.01 for other in others)
    long = random_bits(3 * rounding_module.TABLE + 5, 1)
    assert len(long) == 3 * rounding_module.TABLE + 5 and abs(long.double().mean() / 65536 - 0.5) < 1e-3


def test_noise_is_uniform_and_independent():
    drawn = torch.stack([random_bits(64, t, 5) for t in range(4000)]).double() / 65536
    n = len(drawn)
    assert (drawn.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / n)
    counts = torch.histc(drawn, 16, 0, 1)
    assert (counts / counts.mean() - 1).abs().max() < 0.03
    correlations = torch.corrcoef(drawn.T) - torch.eye(64)
    # entries: the table's own numbers at a distance are independent, up to the common shift that is uniform itself
    assert correlations.abs().max() < 6 / math.sqrt(n)
    lagged = torch.stack([torch.corrcoef(torch.stack([drawn[:-1, i], drawn[1:, i]]))[0, 1] for i in range(8)])
    assert lagged.abs().max() < 5 / math.sqrt(n)


def test_stochastic_rounding_takes_one_of_two_neighbours_and_is_right_on_average():
    x = torch.cat(
        [
            torch.randn(200) * 10.0 ** torch.randint(-30, 30, (200,)),
            torch.tensor([0.0, 1.0, -1.0, 3e-40, -1e-44, 3.3e38]),
        ]
    )
    down, up = neighbours(x)
    total, n = torch.zeros(len(x), dtype=torch.float64), 3000
    for t in range(n):
        stored = torch.empty(len(x), dtype=BF16)
        stochastic_round_(stored, x.clone(), random_bits(len(x), t))
        y = stored.float()
        assert ((y == down) | (y == up)).all()
        total += y.double()
    ulp = (up.double() - down.double()).abs()
    finite = up.isfinite()
    error = (total / n - x.double()).abs()[finite]
    assert (error <= 5 * ulp[finite] * 0.5 / math.sqrt(n) + 1e-300).all()


def test_what_bfloat16_holds_is_not_changed():
    x = torch.randn(1000).bfloat16()
    x[:4] = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])
    stored = torch.empty_like(x)
    stochastic_round_(stored, x.float(), torch.full((1000,), 65535, dtype=torch.int32))
    assert torch.equal(stored.view(torch.int16), x.view(torch.int16))
    stochastic_round_(stored[:1], torch.tensor([float("nan")]), torch.full((1,), 65535, dtype=torch.int32))
    assert stored[0].isnan()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001])
@pytest.mark.parametrize("noise", [0, 1, 65535])
def test_every_nan_stays_nan(bits, noise):
    "The nan that a GPU makes has all bits set but the sign's; with noise added to them they are those of a number."
    stored = torch.zeros(2, dtype=BF16)
    exact = torch.tensor([bits, 0x3F800000], dtype=torch.int32).view(FLOAT32)  # the second is 1
    stochastic_round_(stored, exact, torch.full((2,), noise, dtype=torch.int32))
    assert stored[0].isnan() and stored[1] == 1


@given(n=st.integers(1, 2000), seed=st.integers(0, 2**31), decades=st.floats(0, 6), random=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_eight_bits_are_within_one_step_of_the_codes(n, seed, decades, random):
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(n, generator=generator) * 10 ** (-decades * torch.rand(n, generator=generator))
    codes, absmax = torch.empty(n, dtype=INT8), torch.empty(-(-n // BLOCK))
    kept = m.clone()
    encode_(codes, absmax, m, random_bits(n, seed) if random else None)
    assert torch.equal(m, kept)
    read = decode(codes, absmax)
    scale = absmax.repeat_interleave(BLOCK)[:n]
    assert torch.equal(absmax, torch.stack([block.abs().max() for block in m.split(BLOCK)]))
    width = (2 * codes.abs().float() + 1) / 127**2 * scale  # from a code to the next one up
    assert ((read - m).abs() <= width * (0.5001 if not random else 1.0001) + 1e-6 * scale).all()
    assert ((read == 0) | (read.sign() == m.sign())).all() and codes.abs().max() <= 127


def test_eight_bits_are_right_on_average():
    m = torch.randn(600) * 10 ** (-3 * torch.rand(600))
    codes, absmax = torch.empty(600, dtype=INT8), torch.empty(3)
    total, n = torch.zeros(600), 3000
    for t in range(n):
        encode_(codes, absmax, m, random_bits(600, t))
        total += decode(codes, absmax)
    scale = absmax.repeat_interleave(BLOCK)[:600]
    width = (2 * (m.abs() / scale).sqrt() * 127 + 1) / 127**2 * scale
    assert ((total / n - m).abs() <= 5 * 0.5 * width / math.sqrt(n) + 1e-5 * scale).all()


def test_blocks_of_zeros_and_blocks_that_are_not_finite():
    m = torch.randn(4 * BLOCK)
    m[:BLOCK], m[BLOCK + 3], m[2 * BLOCK + 5] = 0, float("inf"), float("nan")
    codes, absmax = torch.empty(len(m), dtype=INT8), torch.empty(4)
    encode_(codes, absmax, m.clone(), random_bits(len(m), 0))
    read = decode(codes, absmax)
    assert (read[:BLOCK] == 0).all() and read[3 * BLOCK :].isfinite().all()
    assert not read[BLOCK : 2 * BLOCK].isfinite().any() and read[2 * BLOCK : 3 * BLOCK].isnan().all()


@each_form
@pytest.mark.parametrize("layouts", list(itertools.product(MEMORY_FORMATS, repeat=2)), ids="-".join)
def test_close_to_float32_whatever_the_memory_layout(dtype, kw, layouts):
    p_layout, g_layout = (MEMORY_FORMATS[name] for name in layouts)
    p = nn.Parameter(p_layout(torch.randn(40, 12, 3, 3).to(dtype)))
    exact, state = p.detach().double(), {}
    own = {key: value for key, value in kw.items() if key in ("momentum", "nesterov", "maximize")}
    opt, start = SGDSaI([p], lr=2e-3, **kw), p.detach().double()
    for _t in range(40):
        g = torch.randn(40, 12, 3, 3).to(dtype) + 0.5
        p.grad = g_layout(g)
        opt.step()
        exact = sgd_sai_reference(exact, g.double(), state, lr=2e-3, **own)
    allowed = 0.02 if dtype == FLOAT32 or "kahan" in kw.values() else 0.2
    assert (p.detach().double() - exact).norm() < allowed * (exact - start).norm()
    m = opt.state[p].get("momentum_buffer")
    assert m is None or m.dtype == kw.get("state_dtype", dtype) and m.shape == p.shape


@each_form
def test_many_chunks_give_what_one_chunk_gives(dtype, kw, monkeypatch):
    kw = (
        kw | dict(rounding="nearest") if kw.get("rounding") == "stochastic" or "rounding" not in kw else kw
    )  # the noise depends on the chunks
    if kw.get("state_dtype") == INT8 and kw["rounding"] == "kahan":
        pytest.skip("its momentum is rounded with noise, whose chunks differ")
    whole, cut = param(300, 70, dtype=dtype), None
    cut = twin(whole)
    gs = gradients(whole, 5)
    steps(SGDSaI([whole], **kw), [whole], *([g] for g in gs))
    monkeypatch.setattr(rounding_module, "FP32_CHUNK", 1024)
    monkeypatch.setattr("sgd_sai.internals.chunks.FP32_CHUNK", 1024)
    steps(SGDSaI([cut], **kw), [cut], *([g] for g in gs))
    assert torch.equal(whole, cut)


def test_updates_smaller_than_half_a_step_arrive():
    p0 = nn.Parameter(torch.ones(4096, dtype=BF16))
    moved = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        p = twin(p0)
        opt = SGDSaI([p], lr=1e-5, weight_decay=0.0, scale=lambda g: 1.0, rounding=rounding)
        for _ in range(200):
            p.grad = torch.full_like(p, 64.0) * (1 + 0.01 * torch.randn(4096)).bfloat16()
            opt.step()
        moved[rounding] = 1 - (p.double() + opt.state[p].get("compensation", torch.zeros(()))).mean().item()
    assert (
        moved["nearest"] == 0
        and moved["stochastic"] == pytest.approx(0.128, rel=0.05)
        and moved["kahan"] == pytest.approx(0.128, rel=0.03)
    )


def test_a_momentum_in_eight_bits_follows_small_gradients():
    "Rounded to nearest, an average would stay where a tenth of the difference is less than half a step."
    found = {}
    for rounding in ("nearest", None):
        p = param(BLOCK * 8)
        opt = SGDSaI([p], lr=0.0, state_dtype=INT8, rounding=rounding)
        big, small = torch.ones(BLOCK * 8), torch.full((BLOCK * 8,), 0.97)
        big[::BLOCK] = small[::BLOCK] = 2.0
        steps(opt, [p], [big], *[[small]] * 200)
        read = rounding_module.decode_momentum(opt.state[p], FLOAT32)
        found[rounding] = read[torch.arange(len(read)) % BLOCK != 0].mean().item()
    assert abs(found[None] - 0.97) < 0.003 < abs(found["nearest"] - 0.97)


@each_form
def test_resume_at_every_step_is_exact(dtype, kw):
    shapes = [(30, 20), (7,), (), (3, 4, 5)]
    params = [param(*s, dtype=dtype) for s in shapes]
    opt, grads = SGDSaI(params, lr=0.02, **kw), [[torch.randn(s).to(dtype) for s in shapes] for _ in range(12)]
    for t in range(12):
        file = io.BytesIO()
        torch.save((opt.state_dict(), [p.detach() for p in params]), file)
        file.seek(0)
        saved, values = torch.load(file)
        resumed = [nn.Parameter(v.clone()) for v in values]
        other = SGDSaI(resumed, lr=0.02, **kw)
        other.load_state_dict(saved)
        torch.manual_seed(1000 + t)  # a resumed process has another generator
        copied, copied_opt = copy.deepcopy((params, opt))
        for mine, mine_opt in ((resumed, other), (copied, copied_opt)):
            steps(mine_opt, mine, *grads[t:])
        if t == 0:
            straight = [p.detach().clone() for p in resumed]
        assert all(torch.equal(a, b) for a, b in zip(resumed, straight, strict=True)) and all(
            torch.equal(a, b) for a, b in zip(copied, straight, strict=True)
        )
        steps(opt, params, grads[t])


@pytest.mark.parametrize("state_dtype", [BF16, INT8], ids=str)
def test_a_momentum_that_is_switched_off_is_left_alone(state_dtype):
    p = param(60, 40, dtype=BF16)
    q, gs = twin(p), gradients(p, 5)
    opt = SGDSaI([p], rounding="kahan", state_dtype=state_dtype)
    without = SGDSaI([q], rounding="kahan", momentum=0.0)
    for optimizer, theta in ((opt, p), (without, q)):
        steps(optimizer, [theta], [gs[0]])
    q.data.copy_(p.data)
    without.state[q]["compensation"].copy_(opt.state[p]["compensation"])
    saved = {key: value for key, value in opt.state[p].items() if key.startswith("momentum")}
    versions = {key: value._version for key, value in saved.items()}
    opt.param_groups[0]["momentum"] = 0.0
    for g in gs[1:]:
        steps(opt, [p], [g])
        steps(without, [q], [g])
    assert torch.equal(p, q) and saved and all(opt.state[p][key] is value for key, value in saved.items())
    assert versions == {key: value._version for key, value in saved.items()}  # not even written to


@pytest.mark.parametrize(
    "before, after", [(a, b) for a in (FLOAT32, BF16, INT8) for b in (FLOAT32, BF16, INT8) if a != b], ids=str
)
def test_state_moves_between_dtypes(before, after):
    p = param(50, 30)
    opt = SGDSaI([p], state_dtype=before)
    steps(opt, [p], *([g] for g in gradients(p, 3)))
    state = opt.state[p]
    exact = rounding_module.decode_momentum(state, FLOAT32) if before == INT8 else state["momentum_buffer"].float()
    q = twin(p)
    other = SGDSaI([q], state_dtype=after)
    saved = opt.state_dict()
    saved["param_groups"][0]["state_dtype"] = (
        after  # hyperparameters come from the checkpoint, as everywhere in PyTorch
    )
    other.load_state_dict(saved)
    m = other.state[q]["momentum_buffer"]
    assert (
        m.dtype == after and ("momentum_absmax" in other.state[q]) == (after == INT8) and other.scales() == opt.scales()
    )
    read = rounding_module.decode_momentum(other.state[q], FLOAT32) if after == INT8 else m.float()
    assert (read - exact).abs().max() <= {FLOAT32: 0.0, BF16: 2**-8, INT8: 0.01}[after] * exact.abs().max()
    steps(other, [q], *([g] for g in gradients(p, 2)))


def test_compensation_is_kept_where_it_is_used():
    p = param(50, 30, dtype=BF16)
    opt = SGDSaI([p], rounding="kahan")
    steps(opt, [p], *([g] for g in gradients(p, 3)))
    for rounding, kept in (("kahan", True), ("stochastic", False), (None, False)):
        q = twin(p)
        other = SGDSaI([q])
        saved = opt.state_dict()
        saved["param_groups"][0]["rounding"] = rounding
        other.load_state_dict(saved)
        assert ("compensation" in other.state[q]) == kept


@each_form
def test_replicas_stay_equal_and_the_generator_is_left_alone(dtype, kw):
    one = param(60, 40, dtype=dtype)
    other = twin(one)
    gs = gradients(one, 6)
    for seed, p in enumerate((one, other)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        steps(SGDSaI([p], lr=0.02, **kw), [p], *([g] for g in gs))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, other)


def test_parameters_of_one_shape_do_not_share_their_noise():
    params = [nn.Parameter(torch.zeros(64, 64, dtype=BF16)) for _ in range(2)]
    g = torch.randn(64, 64).bfloat16()
    steps(SGDSaI(params, rounding="stochastic", weight_decay=0.0), params, [g, g])
    assert not torch.equal(*params)


BYTES = {  # per entry beyond the parameter, for a tensor of 4096 entries
    "float32": (FLOAT32, {}, 4),
    "bf16 state": (FLOAT32, dict(state_dtype=BF16), 2),
    "int8 state": (FLOAT32, dict(state_dtype=INT8), 1 + 4 / BLOCK),
    "pure bf16": (BF16, {}, 2),
    "kahan": (BF16, dict(rounding="kahan"), 4),
    "momentum 0": (FLOAT32, dict(momentum=0.0), 0),
}


@pytest.mark.parametrize("dtype, kw, per_entry", BYTES.values(), ids=BYTES)
def test_bytes_of_state(dtype, kw, per_entry):
    p = param(64, 64, dtype=dtype)
    opt = SGDSaI([p], **kw)
    steps(opt, [p], *([g] for g in gradients(p, 2)))
    tensors = [x for x in opt.state[p].values() if isinstance(x, torch.Tensor)]
    assert sum(x.numel() * x.element_size() for x in tensors) == per_entry * 4096
    assert all(isinstance(x, (int, float)) for x in opt.state[p].values() if not isinstance(x, torch.Tensor))


@each_form
def test_nothing_of_parameter_size_is_allocated(dtype, kw):
    p = nn.Parameter(torch.randn(2048, 4096).to(dtype))
    p.grad = torch.randn(2048, 4096).to(dtype)
    opt = SGDSaI([p], **kw)
    opt.step()
    opt.step()
    assert allocated_peak(opt.step) <= 10 * 4 * rounding_module.FP32_CHUNK + rounding_module.TABLE * 4


def test_compiled_steps_are_the_same():
    p = param(30, 30)
    q, gs = twin(p), gradients(p, 5)
    one, other = SGDSaI([p], state_dtype=INT8), SGDSaI([q], state_dtype=INT8)
    compiled = torch.compile(other.step, backend="eager")
    for g in gs:
        p.grad, q.grad = g.clone(), g.clone()
        one.step()
        compiled()
    assert torch.equal(p, q)


def test_capturable_steps_round_to_nearest():
    p, q = param(30, 30), None
    q, gs = twin(p), gradients(p, 5)
    steps(SGDSaI([p], state_dtype=BF16, capturable=True), [p], *([g] for g in gs))
    opt = SGDSaI([q], state_dtype=BF16, rounding="nearest")
    steps(opt, [q], *([g] for g in gs))
    assert "step" not in opt.state[q]
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(rounding="up"), "Invalid rounding: 'up'"),
        (dict(state_dtype=torch.int32), "Invalid state_dtype"),
        (dict(state_dtype=torch.uint8), "Invalid state_dtype"),
        (dict(state_dtype=INT8, fused=True), "`fused` supports neither"),
        (dict(rounding="kahan", capturable=True), "`capturable` supports neither"),
        (dict(rounding="stochastic", differentiable=True), "`differentiable` supports neither"),
    ],
    ids=str,
)
def test_settings_that_are_refused(kw, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        SGDSaI([param(3)], **kw)


def test_sharded_parameters(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values, gs = torch.randn(16, 8), [torch.randn(16, 8) for _ in range(3)]
        whole, shard = nn.Parameter(values.clone()), nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
        opts = [SGDSaI([p], state_dtype=BF16) for p in (whole, shard)]
        for g in gs:
            whole.grad, shard.grad = g.clone(), distribute_tensor(g.clone(), mesh, [Shard(0)])
            for opt in opts:
                opt.step()
        assert torch.equal(whole, shard.full_tensor())
        with pytest.raises(RuntimeError, match="sharded parameters"):
            SGDSaI([shard], state_dtype=INT8)
    finally:
        dist.destroy_process_group()


def test_a_first_momentum_that_is_narrow_is_the_gradient():
    g = torch.randn(1000, 3)
    for dtype, error in ((FLOAT32, 0.0), (BF16, 2**-8), (INT8, 0.009)):
        state = init_momentum(g, param(1000, 3), dtype)
        read = rounding_module.decode_momentum(state, FLOAT32) if dtype == INT8 else state["momentum_buffer"].float()
        assert (read - g).abs().max() <= error * g.abs().max()
