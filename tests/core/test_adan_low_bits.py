"Adan with narrow averages and parameters: right on average, exact when resumed, no memory, and what is refused."

import copy
import io
import itertools

import pytest
import torch
from common import MEMORY_FORMATS, param, steps, twin
from common import noise as gradients
from torch import nn

from sgd_sai.adan import Adan, adan_reference
from sgd_sai.adan_kernels import ADAN_STATE
from sgd_sai.benchmarks.measuring import allocated_peak
from sgd_sai.internals import rounding as rounding_module

pytestmark = pytest.mark.usefixtures("seeded")
FLOAT32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FORMS = {  # dtype of the parameter, options
    "bf16 state": (FLOAT32, dict(state_dtype=BF16)),
    "bf16 state to nearest": (FLOAT32, dict(state_dtype=BF16, rounding="nearest")),
    "bf16 state, restarts": (FLOAT32, dict(state_dtype=BF16, restart_radius=1e3)),
    "stochastic": (BF16, dict(rounding="stochastic")),
    "stochastic, float32 state": (BF16, dict(rounding="stochastic", state_dtype=FLOAT32)),
    "stochastic, uphill as AdamW": (BF16, dict(rounding="stochastic", no_prox=True, weight_decay=0.1, maximize=True)),
    "kahan": (BF16, dict(rounding="kahan")),
    "kahan, float32 state": (BF16, dict(rounding="kahan", state_dtype=FLOAT32)),
    "kahan, float16": (FP16, dict(rounding="kahan", state_dtype=FLOAT32)),
    "kahan, decay": (BF16, dict(rounding="kahan", weight_decay=0.1)),
    "float64, bf16 state": (torch.float64, dict(state_dtype=BF16)),
}
each_form = pytest.mark.parametrize("dtype, kw", FORMS.values(), ids=FORMS)


@each_form
@pytest.mark.parametrize("layouts", list(itertools.product(MEMORY_FORMATS, repeat=2)), ids="-".join)
def test_close_to_the_reference_whatever_the_memory_layout(dtype, kw, layouts):
    p_layout, g_layout = (MEMORY_FORMATS[name] for name in layouts)
    p = nn.Parameter(p_layout(torch.randn(40, 12, 3, 3).to(dtype)))
    start = p.detach().double().clone()
    exact, state = start, {}
    own = {key: value for key, value in kw.items() if key in ("weight_decay", "no_prox", "maximize")}
    opt = Adan([p], lr=0.02, **kw)
    for _t in range(40):
        g = torch.randn(40, 12, 3, 3).to(dtype) + 0.5
        p.grad = g_layout(g)
        opt.step()
        exact = adan_reference(exact, g.double(), state, lr=0.02, **own)
    found = p.detach().double() + opt.state[p].get("compensation", torch.zeros((), dtype=dtype)).double()
    allowed = 0.1 if kw.get("rounding") == "stochastic" else 0.01
    assert (found - exact).norm() < allowed * (exact - start).norm()
    assert all(
        opt.state[p][key].dtype == kw.get("state_dtype", dtype) and opt.state[p][key].shape == p.shape
        for key in ADAN_STATE
    )


@each_form
def test_many_chunks_give_what_one_chunk_gives(dtype, kw, monkeypatch):
    if kw.get("rounding") != "kahan" or kw.get("state_dtype") == BF16:
        kw = kw | dict(rounding="nearest")  # noise depends on the chunks
    whole = param(300, 70, dtype=dtype)
    cut, gs = twin(whole), gradients(whole, 5)
    steps(Adan([whole], **kw), [whole], *([g] for g in gs))
    monkeypatch.setattr("sgd_sai.internals.chunks.FP32_CHUNK", 1024)
    steps(Adan([cut], **kw), [cut], *([g] for g in gs))
    torch.testing.assert_close(whole, cut, rtol=0, atol=0)


@pytest.mark.parametrize("rounding, first, later", [(None, 1.0, 0.85**2), ("nearest", 0.8, 0.8)], ids=str)
def test_an_average_of_squares_follows_small_changes(rounding, first, later):
    "Rounded to nearest, an average stays where a hundredth of the difference is less than half a step."
    p = param(4096)
    opt = Adan([p], lr=0.0, state_dtype=BF16, rounding=rounding)
    for g, expected in ((1.0, first), (0.85, later)):
        steps(opt, [p], *[[torch.full((4096,), g)]] * 600)
        assert opt.state[p]["exp_avg_sq"].double().mean().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("key", ADAN_STATE)
def test_every_state_tensor_is_right_on_average(key):
    "Entries with the same gradients differ by their noise only, and on average by nothing."
    p, exact = param(1 << 14), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    narrow, wide = Adan([p], lr=0.0, state_dtype=BF16), Adan([exact], lr=0.0)
    for g in 1 + 0.3 * torch.randn(60, dtype=torch.float64):
        g = g.float()
        steps(narrow, [p], [g.expand(1 << 14)])
        steps(wide, [exact], [g.double().reshape(1)])
    stored, expected = narrow.state[p][key], wide.state[exact][key].item()
    assert len(stored.unique()) > 1 and stored.dtype == BF16
    spread = stored.double().std().item() / 128
    assert abs(stored.double().mean().item() - expected) < 5 * spread


def test_updates_smaller_than_half_a_step_arrive():
    p0 = nn.Parameter(torch.ones(4096, dtype=BF16))
    moved = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        p = twin(p0)
        opt = Adan([p], lr=1e-4, rounding=rounding, state_dtype=FLOAT32)
        steps(opt, [p], *[[torch.ones_like(p)]] * 200)
        moved[rounding] = 1 - (p.double() + opt.state[p].get("compensation", torch.zeros(()))).mean().item()
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(0.02, rel=0.05) and moved["kahan"] == pytest.approx(0.02, rel=0.01)


@each_form
def test_the_first_step_and_one_after_a_pause_have_no_difference(dtype, kw):
    if kw.get("rounding") == "nearest":
        pytest.skip("the gradient is compared with its rounded copy")
    p = param(50, 30, dtype=dtype)
    opt, gs = Adan([p], **kw), gradients(p, 3)
    steps(opt, [p], [gs[0]])
    assert not opt.state[p]["exp_avg_diff"].any()
    steps(opt, [p], [None])
    assert "neg_pre_grad" not in opt.state[p]
    steps(opt, [p], [gs[1]])
    assert not opt.state[p]["exp_avg_diff"].any()
    steps(opt, [p], [gs[2]])
    assert opt.state[p]["exp_avg_diff"].any()


@each_form
def test_resume_at_every_step_of_thirty_is_exact(dtype, kw):
    shapes = [(30, 20), (7,), (), (3, 4, 5)]
    params = [param(*s, dtype=dtype) for s in shapes]
    opt = Adan(params, lr=0.02, **kw)
    grads = [[torch.randn(s).to(dtype) for s in shapes] for _ in range(30)]
    grads[5][1] = grads[6][1] = grads[17][0] = None  # pauses
    for t in range(30):
        file = io.BytesIO()
        torch.save((opt.state_dict(), [p.detach() for p in params]), file)
        file.seek(0)
        saved, values = torch.load(file, weights_only=True)
        resumed = [nn.Parameter(v.clone()) for v in values]
        other = Adan(resumed, lr=0.02, **kw)
        other.load_state_dict(saved)
        torch.manual_seed(1000 + t)  # a resumed process has another generator
        copied, copied_opt = copy.deepcopy((params, opt))
        for mine, mine_opt in ((resumed, other), (copied, copied_opt)):
            steps(mine_opt, mine, *grads[t:])
        if t == 0:
            straight = [p.detach().clone() for p in resumed]
        for mine in (resumed, copied):
            assert all(torch.equal(a, b) for a, b in zip(mine, straight, strict=True))
        steps(opt, params, grads[t])


@pytest.mark.parametrize("dtype, state_dtype", [(BF16, None), (BF16, FP16), (FP16, FLOAT32), (FLOAT32, BF16)], ids=str)
@pytest.mark.parametrize("after", ["kahan", "stochastic", "nearest", None])
def test_a_compensation_is_loaded_exactly_where_it_is_used(dtype, state_dtype, after):
    p = param(50, 30, dtype=dtype)
    opt = Adan([p], rounding="kahan", state_dtype=state_dtype)
    steps(opt, [p], *([g] for g in gradients(p, 3)))
    q = twin(p)
    other, saved = Adan([q]), opt.state_dict()
    saved["param_groups"][0]["rounding"] = after
    other.load_state_dict(saved)
    kept = dtype != FLOAT32 and after == "kahan"
    assert ("compensation" in other.state[q]) == kept and ("compensation" in opt.state[p]) == (dtype != FLOAT32)
    if kept:
        residual = other.state[q]["compensation"]
        assert residual.dtype == dtype and residual.any() and torch.equal(residual, opt.state[p]["compensation"])
    steps(other, [q], *([g] for g in gradients(p, 2)))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (torch.zeros(3), r"compensation has the shape \(3,\)"),
        (torch.zeros(50, 30, dtype=torch.int64), "compensation is torch.int64"),
        (0.5, "compensation is float, not a tensor"),
    ],
    ids=["shape", "dtype", "number"],
)
def test_a_wrong_compensation_is_refused_before_anything_is_loaded(wrong, message):
    p = param(50, 30, dtype=BF16)
    opt = Adan([p], rounding="kahan")
    steps(opt, [p], *([g] for g in gradients(p, 2)))
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["compensation"] = wrong
    fresh = Adan([twin(p)], rounding="kahan")
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(saved)
    assert not fresh.state


def test_a_compensation_that_does_not_fit_is_refused_before_the_step():
    p = param(50, 30, dtype=BF16)
    opt = Adan([("p", p)], rounding="kahan")
    steps(opt, [p], *([g] for g in gradients(p, 2)))
    opt.state[p]["compensation"], before = torch.zeros(3, dtype=BF16), p.detach().clone()
    with pytest.raises(RuntimeError, match=r"state of p does not fit: compensation has the shape \(3,\)"):
        opt.step()
    assert torch.equal(p, before)


@each_form
def test_replicas_stay_equal_and_the_generator_is_left_alone(dtype, kw):
    one = param(60, 40, dtype=dtype)
    other, gs = twin(one), gradients(one, 6)
    for seed, p in enumerate((one, other)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        steps(Adan([p], lr=0.02, **kw), [p], *([g] for g in gs))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, other)


def test_noise_differs_by_parameter_entry_chunk_and_step(monkeypatch):
    monkeypatch.setattr("sgd_sai.internals.chunks.FP32_CHUNK", 512)
    keys = []

    def noted(n, *key, device):
        keys.append(key)
        return random_bits(n, *key, device=device)

    random_bits = rounding_module.random_bits
    monkeypatch.setattr(rounding_module, "random_bits", noted)
    params = [param(32, 32, dtype=BF16) for _ in range(2)]
    opt = Adan(params, rounding="stochastic")
    steps(opt, params, *[[torch.randn(32, 32).bfloat16() for _ in params]] * 3)
    assert len(keys) == len(set(keys)) == 3 * 2 * 2 * 5  # steps, parameters, chunks, tensors


BYTES = {  # per entry beyond the parameter, for a tensor of 4096 entries
    "float32": (FLOAT32, {}, 16),
    "bf16 state": (FLOAT32, dict(state_dtype=BF16), 8),
    "pure bf16": (BF16, {}, 8),
    "stochastic": (BF16, dict(rounding="stochastic"), 8),
    "kahan": (BF16, dict(rounding="kahan"), 10),
}


@pytest.mark.parametrize("dtype, kw, per_entry", BYTES.values(), ids=BYTES)
def test_bytes_of_state(dtype, kw, per_entry):
    p = param(64, 64, dtype=dtype)
    opt = Adan([p], **kw)
    steps(opt, [p], *([g] for g in gradients(p, 2)))
    assert sum(x.numel() * x.element_size() for x in opt.state[p].values()) == per_entry * 4096 + 4


@each_form
def test_nothing_of_parameter_size_is_allocated(dtype, kw):
    p = nn.Parameter(torch.randn(2048, 4096).to(dtype))
    p.grad = torch.randn(2048, 4096).to(dtype)
    opt = Adan([p], **kw)
    opt.step()
    opt.step()
    width = 8 if dtype == torch.float64 else 4
    assert allocated_peak(opt.step) <= 16 * width * rounding_module.FP32_CHUNK + rounding_module.TABLE * 4


@pytest.mark.parametrize("form", ["bf16 state", "stochastic", "kahan"])
def test_compiled_steps_are_the_same(form):
    torch._dynamo.reset()
    dtype, kw = FORMS[form]
    p = param(30, 30, dtype=dtype)
    q, gs = twin(p), gradients(p, 5)
    one = Adan([p], lr=torch.tensor(0.01), **kw)
    other = Adan([q], lr=torch.tensor(0.01), **kw)
    compiled = torch.compile(other.step, backend="eager")
    for g in gs:
        p.grad, q.grad = g.clone(), g.clone()
        one.step()
        compiled()
    assert torch.equal(p, q)
    assert all(torch.equal(value, other.state[q][key]) for key, value in one.state[p].items())


def test_capturable_steps_round_to_nearest(monkeypatch):
    def drawn(*args, **kwargs):
        raise AssertionError("noise was drawn")

    p = param(30, 30)
    q, gs = twin(p), gradients(p, 5)
    monkeypatch.setattr(rounding_module, "random_bits", drawn)
    steps(Adan([p], state_dtype=BF16, capturable=True), [p], *([g] for g in gs))
    steps(Adan([q], state_dtype=BF16, rounding="nearest"), [q], *([g] for g in gs))
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(rounding="up"), "Invalid rounding: 'up'"),
        (dict(state_dtype=torch.int32), "Invalid state_dtype"),
        (dict(state_dtype=torch.int8), "Invalid state_dtype value: torch.int8 .*too many powers of two"),
        (dict(rounding="kahan", capturable=True), "`capturable` supports neither .* nor `rounding='kahan'`"),
        (dict(rounding="stochastic", capturable=True), "`capturable` supports neither"),
        (dict(rounding="stochastic", differentiable=True), "`differentiable` supports neither"),
        (dict(rounding="kahan", differentiable=True), "`differentiable` supports neither"),
    ],
    ids=str,
)
def test_settings_that_are_refused(kw, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        Adan([param(3)], **kw)
    opt = Adan([param(3)])
    with pytest.raises((ValueError, RuntimeError), match=message):
        opt.add_param_group({"params": [param(2)], **kw})
    assert len(opt.param_groups) == 1


def test_a_wide_parameter_drops_the_compensation_of_a_narrow_one():
    p = param(20, 20, dtype=BF16)
    opt = Adan([p], rounding="kahan", state_dtype=FLOAT32)
    steps(opt, [p], *([g] for g in gradients(p, 2)))
    wide = nn.Parameter(p.detach().float())
    other = Adan([wide], rounding="kahan", state_dtype=FLOAT32)
    other.load_state_dict(opt.state_dict())
    assert "compensation" in opt.state[p] and "compensation" not in other.state[wide]


def test_two_groups_with_two_roundings():
    kept = [param(20, 20, dtype=BF16) for _ in range(2)]
    params = [twin(p) for p in kept]
    gs = [gradients(p, 4) for p in params]
    opt = Adan([{"params": params[:1], "rounding": "kahan"}, {"params": params[1:], "rounding": "nearest"}])
    steps(opt, params, *zip(*gs, strict=True))
    alone = twin(kept[1])
    steps(Adan([alone]), [alone], *([g] for g in gs[1]))
    assert "compensation" in opt.state[params[0]] and "compensation" not in opt.state[params[1]]
    assert torch.equal(alone, params[1])


def test_checkpoints_without_a_rounding_load():
    p = param(20, 20)
    opt = Adan([p])
    steps(opt, [p], *([g] for g in gradients(p, 2)))
    saved = opt.state_dict()
    del saved["param_groups"][0]["rounding"]
    other = Adan([twin(p)], rounding="stochastic")
    other.load_state_dict(saved)
    assert other.param_groups[0]["rounding"] == "stochastic"
    other.step()


def test_sharded_parameters(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for dtype, kw in ((FLOAT32, dict(state_dtype=BF16)), (BF16, dict(rounding="kahan"))):
            values, gs = torch.randn(16, 8).to(dtype), [torch.randn(16, 8).to(dtype) for _ in range(3)]
            whole = nn.Parameter(values.clone())
            shard = nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
            opts = [Adan([p], **kw) for p in (whole, shard)]
            for g in gs:
                whole.grad, shard.grad = g.clone(), distribute_tensor(g.clone(), mesh, [Shard(0)])
                for opt in opts:
                    opt.step()
            assert torch.equal(whole, shard.full_tensor())
            other = Adan([twin(shard)], **kw)
            other.load_state_dict(opts[1].state_dict())
            assert all(hasattr(other.state[other.param_groups[0]["params"][0]][key], "to_local") for key in ADAN_STATE)
    finally:
        dist.destroy_process_group()
