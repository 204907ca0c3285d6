"""MuonSaI under each rule of its rest: the class beside a reference of a few lines, what it keeps, what it refuses,
how it resumes, how much memory a step takes; and its matrices beside torch.optim.Muon."""

import copy
import io
import math

import pytest
import torch
from common import param, peak_of_new_memory
from torch import nn

from sgd_sai import MuonSaI, SGDSaI
from sgd_sai.experiments.state_rules import state_bytes
from sgd_sai.muon_layout import step_length
from sgd_sai.orthogonalize import get_coefficients, orthogonalize
from sgd_sai.rest_rules import REST_BY_ROLE, rest_reference
from sgd_sai.sgd_sai import sgd_sai_reference

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")
BF16, INT8 = torch.bfloat16, torch.int8
each_rest = pytest.mark.parametrize("rest", REST_BY_ROLE)
MARKS = {  # of each parameter of the small model
    "embedding": dict(muon=False, role="embedding"),
    "plain": dict(muon=True),
    "fused": dict(muon=True, split=(16, 16, 16)),
    "heads": dict(muon=True, split=8),
    "transposed": dict(muon=True, transposed=True),
    "experts": dict(muon=True, stacked=True),
    "head": dict(muon=False, role="head"),
    "bias": dict(muon=False, role="vector", weight_decay=0.0),
    "gain": dict(muon=False, role="vector", weight_decay=0.0),
}
SHAPES = {
    **{"embedding": (30, 16), "plain": (24, 16), "fused": (48, 16), "heads": (32, 16), "transposed": (16, 40)},
    **{"experts": (3, 12, 16), "head": (30, 16), "bias": (40,), "gain": (16,)},
}
BAD = ("plain", "embedding", "head", "bias")


def small_params(dtype=torch.float32):
    return {name: param(*shape, dtype=dtype) for name, shape in SHAPES.items()}


def groups_of(params):
    return [{"params": [(name, p)], **MARKS[name]} for name, p in params.items()]


def gradients(count, dtype=torch.float32):
    "Gradients for so many steps; in each, some rows of the embedding are absent."
    steps = []
    for _ in range(count):
        given = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        given["embedding"] *= (torch.rand(30, 1) > 0.4).float()
        steps.append({name: g.to(dtype) for name, g in given.items()})
    return steps


def give(params, grads):
    for name, p in params.items():
        p.grad = grads[name].clone() if p.grad is None else p.grad.copy_(grads[name])


# --- a reference of a few lines -------------------------------------------------------------------------------------


def reference_factor(u, name):
    "The orthogonal factor of each matrix of a parameter, times the length of its step."
    if name == "transposed":
        return reference_factor(u.T, "plain").T
    if name in ("fused", "heads"):
        parts = u.split(16 if name == "fused" else 8)
        return torch.cat([reference_factor(part, "plain") for part in parts])
    return orthogonalize(u) * step_length("original", *u.shape[-2:])


def reference_step(theta, g, state, name, group):
    "One step of any parameter, as the equations stand."
    lr, mu, decay, nesterov = (group[key] for key in ("lr", "momentum", "weight_decay", "nesterov"))
    lr, others = lr * group["lr_factor"], dict(weight_decay=decay, nesterov=nesterov, eps=group["eps"])
    if group["muon"]:
        m = state["momentum_buffer"] = state.get("momentum_buffer", torch.zeros_like(g)).lerp(g, 1 - mu)
        factor = reference_factor(g.lerp(m, mu) if nesterov else m, name)
        return theta * (1 - lr * decay) - lr * factor
    if group["rest"] == "sgd_sai":
        return sgd_sai_reference(theta, g, state, lr, mu, **others)
    return rest_reference(group["rest"], theta, g, state, lr, mu, **others)


FORMS = {"chosen": (None, None), "foreach": (True, None), "for-loop": (False, None)}
FORMS |= {"compiled": (None, "aot_eager")}


@each_rest
@pytest.mark.parametrize("foreach, backend", FORMS.values(), ids=FORMS)
def test_every_form_is_the_reference(rest, foreach, backend):
    torch._dynamo.reset()
    params, states = small_params(), {name: {} for name in SHAPES}
    thetas = {name: p.detach().clone() for name, p in params.items()}
    fused = False if foreach is False and rest == "sgd_sai" else None
    opt = MuonSaI(groups_of(params), lr=0.02, rest=rest, weight_decay=0.1, foreach=foreach, fused=fused)
    step = opt.step if backend is None else torch.compile(opt.step, backend=backend)
    start = dict(thetas)
    for t, grads in enumerate(gradients(20)):
        give(params, grads)
        step()
        for group, (name, p) in zip(opt.param_groups, params.items(), strict=True):
            thetas[name] = reference_step(thetas[name], grads[name], states[name], name, group)
            for mine, expected in (
                (p, thetas[name]),
                (opt.state[p]["momentum_buffer"], states[name]["momentum_buffer"]),
            ):
                assert (mine.detach() - expected).abs().max() <= 1e-6 * expected.abs().max(), (t, name)
    assert all((thetas[name] - theta).abs().max() > 1e-3 for name, theta in start.items())


def test_each_rule_is_used():
    "The groups of the roles have the rules and rates of the table, and no two choices of the rest make the same steps."
    ends = {}
    for rest, by_role in REST_BY_ROLE.items():
        torch.manual_seed(0)
        params = small_params()
        opt = MuonSaI(groups_of(params), lr=0.02, rest=rest)
        for group in opt.param_groups:
            if not group["muon"]:
                expected = {key: value for key, value in by_role[group["role"]].items() if key in group}
                assert expected and expected.items() <= group.items()
        give(params, gradients(1)[0])
        opt.step()
        ends[rest] = torch.cat([p.detach().flatten() for name, p in params.items() if not MARKS[name]["muon"]])
    assert len({round(float(end.norm()), 6) for end in ends.values()}) == len(ends)


# --- going on from a file -------------------------------------------------------------------------------------------

ROUNDED = [(torch.float32, dtype, rounding) for dtype in (None, BF16, INT8) for rounding in (None, "nearest")]
ROUNDED += [(torch.float32, dtype, "stochastic") for dtype in (BF16, INT8)]
ROUNDED += [(BF16, dtype, rounding) for dtype in (None, INT8) for rounding in (None, "nearest", "stochastic", "kahan")]


def saved(opt, params):
    file = io.BytesIO()
    torch.save((opt.state_dict(), [p.detach() for p in params.values()]), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_rest
@pytest.mark.parametrize("dtype, state_dtype, rounding", ROUNDED, ids=str)
def test_a_step_after_loading_is_the_step_without_it(rest, dtype, state_dtype, rounding):
    "At every one of 30 steps, of 6 in few bits: parameters and whole state, bit for bit."
    count = 30 if state_dtype is None and rounding is None else 6
    settings = dict(lr=0.02, rest=rest, state_dtype=state_dtype, rounding=rounding)
    params = small_params(dtype)
    opt, begun = MuonSaI(groups_of(params), **settings), {name: p.detach().clone() for name, p in params.items()}
    for t, grads in enumerate(gradients(count, dtype)):
        state, values = saved(opt, params)
        twins = {name: nn.Parameter(value) for name, value in zip(params, values, strict=True)}
        other = MuonSaI(groups_of(twins), lr=1.0)
        other.load_state_dict(state)
        torch.manual_seed(1000 + t)  # a new process has another generator
        for each, its_params in ((opt, params), (other, twins)):
            give(its_params, grads)
            each.step()
        for name, p in params.items():
            assert torch.equal(p, twins[name]), (t, name)
            mine, theirs = opt.state[p], other.state[twins[name]]
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                equal = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
                assert equal and type(value) is type(theirs[key]), (t, name, key)
    for name, p in params.items():
        assert opt.state[p]["momentum_buffer"].dtype == (state_dtype or dtype) and not torch.equal(p, begun[name])


# --- what is kept ---------------------------------------------------------------------------------------------------


class Language(nn.Module):
    "About 100,000 parameters: an embedding, two blocks, a head."

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 300)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))


@each_rest
def test_at_most_four_bytes_per_parameter_are_kept(rest):
    model = Language()
    opt = MuonSaI(model, rest=rest)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
    count = sum(p.numel() for p in model.parameters())
    assert 80_000 < count < 120_000 and {group["role"] for group in opt.param_groups} == {
        *("matrix", "vector"),
        *BAD[1:3],
    }
    assert 4 * count <= state_bytes(opt) <= 4.1 * count


# --- gradients that are not finite ----------------------------------------------------------------------------------


def everything(opt, params):
    return copy.deepcopy(([p.detach() for p in params.values()], [dict(opt.state.get(p, {})) for p in params.values()]))


@each_rest
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("state_dtype", [None, INT8], ids=str)
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(rest, name, steps_before, state_dtype):
    params = small_params()
    opt = MuonSaI(groups_of(params), rest=rest, state_dtype=state_dtype)
    *before, last = gradients(steps_before + 1)
    for grads in before:
        give(params, grads)
        opt.step()
    give(params, last)
    for bad in (math.nan, math.inf, -math.inf):
        params[name].grad.view(-1)[3] = bad
        kept = everything(opt, params)
        with pytest.raises(RuntimeError, match=f"gradient of {name} is not finite"):
            opt.step()
        torch.testing.assert_close(everything(opt, params), kept, rtol=0, atol=0)
    params[name].grad.view(-1)[3] = 0.1
    opt.step()
    assert all(p.isfinite().all() for p in params.values())


# --- groups of Keller Jordan's class --------------------------------------------------------------------------------


@each_rest
def test_groups_that_were_written_for_keller_jordans_class_work(rest):
    ends = []
    for as_his in (True, False):
        torch.manual_seed(0)
        params = small_params()
        hidden = [params[name] for name in ("plain", "fused")]
        others = [params[name] for name in ("embedding", "head", "bias")]
        matrices = dict(params=hidden, lr=0.02, momentum=0.9, weight_decay=0.01)
        rest_group = dict(params=others, lr=3e-4, eps=1e-10, weight_decay=0.05)
        if as_his:
            groups = [matrices | {"use_muon": True}, rest_group | {"use_muon": False, "betas": (0.8, 0.95)}]
            with pytest.warns(UserWarning, match=f"was written for Adam, and MuonSaI steps it by rest='{rest}'"):
                opt = MuonSaI(groups, rest=rest)
        else:
            opt = MuonSaI([matrices | {"muon": True}, rest_group | {"muon": False, "momentum": 0.8}], rest=rest)
        for grads in gradients(3):
            give(params, grads)
            opt.step()
        assert [group["lr"] * group["lr_factor"] for group in opt.param_groups] == [0.02, 3e-4]
        ends.append({name: p.detach() for name, p in params.items()})
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    torch.manual_seed(0)
    start = small_params()
    moved = [name for name, p in start.items() if not torch.equal(p, ends[0][name])]
    assert moved == ["embedding", "plain", "fused", "head", "bias"]


# --- beside torch.optim.Muon ----------------------------------------------------------------------------------------


def in_float32(grad, ns_coefficients, ns_steps, eps):
    "As in PyTorch, whose function computes in bfloat16."
    a, b, c = ns_coefficients
    X = grad.T if grad.size(0) > grad.size(1) else grad
    X = X / X.norm().clamp(min=eps)
    for _ in range(ns_steps):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.T if grad.size(0) > grad.size(1) else X


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("ns_steps, ns_coefficients", [(5, "jordan"), (3, "jordan"), (6, (2.0, -1.5, 0.5))], ids=str)
def test_matrices_step_as_in_pytorch(adjust_lr, nesterov, ns_steps, ns_coefficients, monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", in_float32)
    shapes = [(40, 12), (12, 40), (20, 20)]
    mine = [param(*shape) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    settings = dict(lr=0.05, weight_decay=0.1, momentum=0.9, nesterov=nesterov, ns_steps=ns_steps)
    opt = MuonSaI([{"params": mine, "muon": True}], adjust_lr=adjust_lr, ns_coefficients=ns_coefficients, **settings)
    (triple,) = get_coefficients(ns_coefficients, 1)
    muon = torch.optim.Muon(theirs, adjust_lr_fn=adjust_lr, ns_coefficients=triple, **settings)
    start = [p.detach().clone() for p in mine]
    for _ in range(8):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        opt.step(), muon.step()
        for p, q in zip(mine, theirs, strict=True):
            assert (p - q).abs().max() <= 1e-5
    assert all((p - s).abs().max() > 0.05 for p, s in zip(mine, start, strict=True))


# --- compiled steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(state_dtype=BF16), dict(state_dtype=INT8), dict(capturable=True)], ids=str)
@pytest.mark.parametrize("rest", [None, *REST_BY_ROLE])  # None: SGDSaI
def test_a_compiled_step_rounds_as_the_ordinary_one_does(rest, settings):
    "The compiler makes every group capturable, and those of a user who asked for it round to nearest."
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        params = small_params()
        lr = torch.tensor(0.02) if "capturable" in settings else 0.02
        if rest is None:
            opt = SGDSaI(list(params.items()), lr=lr, **settings)
        else:
            opt = MuonSaI(groups_of(params), lr=lr, rest=rest, **settings)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for grads in gradients(4):
            give(params, grads)
            step()
        ends.append([p.detach() for p in params.values()] + [opt.state[p]["momentum_buffer"] for p in params.values()])
        assert all(("step" in opt.state[p]) == ("capturable" not in settings) for p in params.values())
    tolerance = dict(rtol=1e-5, atol=1e-6) if "capturable" in settings else dict(rtol=0, atol=0)
    torch.testing.assert_close(*ends, **tolerance)


@pytest.mark.parametrize("rest", REST_BY_ROLE)
def test_the_rest_works_without_a_momentum(rest):
    "The rules with Nesterov's momentum leave it out then, and the matrices keep theirs."
    opt = MuonSaI(groups_of(small_params()), rest=rest, rest_momentum=0.0)
    for group in opt.param_groups:
        assert (group["momentum"], group["nesterov"]) == ((0.95, True) if group["muon"] else (0.0, False))


@each_rest
def test_rates_may_be_tensors(rest):
    "With capturable=True on the CPU: the steps are those of a rate that is a number."
    ends = []
    for as_tensor in (False, True):
        torch.manual_seed(0)
        params = small_params()
        rate = torch.tensor(0.02) if as_tensor else 0.02
        opt = MuonSaI(groups_of(params), lr=rate, rest=rest, weight_decay=0.1, capturable=True)
        for grads in gradients(4):
            give(params, grads)
            opt.step()
        ends.append([p.detach() for p in params.values()])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


# --- memory of a step -----------------------------------------------------------------------------------------------


@each_rest
@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_a_step_needs_one_matrix_and_a_hundredth_of_the_parameters(rest, has_bfloat16, monkeypatch):
    "One matrix at a time, with the two squares of its iteration; chunks for all else."
    monkeypatch.setattr("sgd_sai.orthogonalize._has_bfloat16", lambda: has_bfloat16)
    monkeypatch.setattr("sgd_sai.orthogonalize.BFLOAT16_FROM", 256)
    hidden = [param(256, 1024) for _ in range(16)] + [param(256, 256) for _ in range(16)]
    tables = [("embedding", param(30000, 256)), ("head", param(10000, 256))]
    groups = [{"params": hidden, "muon": True}, {"params": [param(1024) for _ in range(16)], "muon": False}]
    opt = MuonSaI(groups + [{"params": [p], "muon": False, "role": role} for role, p in tables], rest=rest, ns_steps=1)
    params = [p for group in opt.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    a_hundredth, one = sum(p.numel() for p in params) * 4 / 100, 256 * 1024 * 4
    peak = peak_of_new_memory(opt.step)
    print(f"{rest}, bfloat16 {has_bfloat16}: {peak / 1e6:.2f} of {(a_hundredth + one) / 1e6:.2f} MB")
    assert peak <= a_hundredth + one
