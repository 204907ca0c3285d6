"""A step compares shapes before any kernel gets pointers: an error names the parameter, and nothing is changed.

A momentum that is smaller than its parameter would be written beyond its end."""

import copy

import pytest
import torch
from torch import nn

from sgd_sai import AdaHessian, Adan, MuonSaI, SGDSaI, StepInBackward
from sgd_sai.internals.rounding import BLOCK

pytestmark = pytest.mark.usefixtures("seeded", "kernels_for_small_tensors_too")
BF16, INT8 = torch.bfloat16, torch.int8
SHAPE = (12, 50)
OTHER_SHAPES = {
    "grown": (20, 50),
    "shrunk": (5, 50),
    "of equal size": (50, 12),
    "one that broadcasts": (1, 50),
    "of another number of dimensions": (600,),
}
each_shape = pytest.mark.parametrize("shape", OTHER_SHAPES.values(), ids=OTHER_SHAPES)


def make(cls, **kw):
    "A function of named parameters, in groups of one, to an optimizer."
    return lambda named: cls([{"params": [pair]} for pair in named], **kw)


def muon(hidden, **kw):
    "A function as `make` returns, of which one parameter is a hidden matrix."
    return lambda named: MuonSaI([{"params": [pair], "muon": pair[0] == hidden} for pair in named], **kw)


OPTIMIZERS = {  # the function, and the dtype of the parameters
    "SGDSaI": (make(SGDSaI), torch.float32),
    "forloop": (make(SGDSaI, foreach=False, fused=False), torch.float32),
    "foreach": (make(SGDSaI, foreach=True), torch.float32),
    "fused": (make(SGDSaI, fused=True), torch.float32),
    "fused, no decay": (make(SGDSaI, fused=True, weight_decay=0.0), torch.float32),
    "nesterov": (make(SGDSaI, nesterov=True), torch.float32),
    "capturable": (make(SGDSaI, capturable=True), torch.float32),
    "normalize": (make(SGDSaI, normalize=True), torch.float32),
    "bf16 state": (make(SGDSaI, state_dtype=BF16), torch.float32),
    "int8 state": (make(SGDSaI, state_dtype=INT8), torch.float32),
    "bf16": (make(SGDSaI), BF16),
    "stochastic": (make(SGDSaI, rounding="stochastic"), BF16),
    "kahan": (make(SGDSaI, rounding="kahan"), BF16),
    "complex": (make(SGDSaI), torch.complex64),
    "Adan": (make(Adan), torch.float32),
    "Adan, forloop": (make(Adan, foreach=False), torch.float32),
    "Adan, foreach": (make(Adan, foreach=True), torch.float32),
    "Adan, restarts": (make(Adan, restart_radius=1e6), torch.float32),
    "Adan, bf16": (make(Adan), BF16),
    "AdaHessian": (make(AdaHessian), torch.float32),
    "MuonSaI": (muon("matrix"), torch.float32),
    "MuonSaI, the rest": (muon("first"), torch.float32),
    "MuonSaI, bf16 state": (muon("matrix", state_dtype=BF16), torch.float32),
    "MuonSaI, int8 state": (muon("matrix", state_dtype=INT8), torch.float32),
    "MuonSaI, kahan": (muon("matrix", rounding="kahan"), BF16),
    "MuonSaI, capturable": (muon("matrix", capturable=True), torch.float32),
    **{f"MuonSaI, {rest}": (muon("first", rest=rest), torch.float32) for rest in ("sign", "row_norm", "adams")},
    "MuonSaI, row_norm, int8 state": (muon("first", rest="row_norm", state_dtype=INT8), torch.float32),
    "MuonSaI, sign, kahan": (muon("first", rest="sign", rounding="kahan"), BF16),
    "MuonSaI, adams, int8 to nearest": (muon("first", rest="adams", state_dtype=INT8, rounding="nearest"), BF16),
}
each_optimizer = pytest.mark.parametrize("build, dtype", OPTIMIZERS.values(), ids=OPTIMIZERS)


def give_gradients(opt, named):
    "Gradients of a quadratic, which AdaHessian needs to have a graph."
    for _, p in named:
        p.grad = None
    loss = sum(p.abs().square().sum() for _, p in named)
    loss.backward(create_graph=isinstance(opt, AdaHessian))


def started(build, dtype):
    "An optimizer after two steps of parameters in three groups; the last one has had no gradient."
    named = [("first", nn.Parameter(torch.randn(SHAPE).to(dtype)))]
    named += [(name, nn.Parameter(torch.randn(SHAPE).to(dtype))) for name in ("matrix", "late")]
    opt = build(named)
    for _ in range(2):
        give_gradients(opt, named[:2])
        opt.step()
    return opt, dict(named)


def snapshot(opt, params):
    return copy.deepcopy([(p.detach(), dict(opt.state.get(p, {}))) for p in params.values()])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and (a.is_meta or torch.equal(a, b))
    return a == b


def assert_refused(opt, params, *words):
    "The step raises, the error has all the words, and no parameter and no state has changed."
    before = snapshot(opt, params)
    with pytest.raises(RuntimeError) as error:
        opt.step()
    for word in words:
        assert str(word) in str(error.value)
    for (p, state), (q, kept) in zip(snapshot(opt, params), before, strict=True):
        assert same(p, q) and state.keys() == kept.keys() and all(same(state[key], kept[key]) for key in kept)


def state_tensors(opt, p):
    "The entries of the state of `p` that have its shape."
    return [key for key, value in opt.state[p].items() if isinstance(value, torch.Tensor) and value.shape == p.shape]


def state_keys(build, dtype):
    opt, params = started(build, dtype)
    return state_tensors(opt, params["matrix"])


@each_shape
@each_optimizer
def test_parameter_that_was_replaced_by_one_of_another_shape(build, dtype, shape):
    "A vocabulary that grows, a layer that is pruned: `p.data` is another tensor than when the state was made."
    opt, params = started(build, dtype)
    p = params["matrix"]
    p.grad = None
    p.data = torch.randn(shape).to(dtype)
    give_gradients(opt, params.items())
    assert_refused(opt, params, "matrix", SHAPE, shape, "del optimizer.state[p]")
    if len(shape) > 1:  # what the error says to do
        del opt.state[p]
        give_gradients(opt, params.items())
        opt.step()
        assert p.shape == shape and p.abs().isfinite().all()
        assert all(opt.state[p][key].shape == shape for key in state_tensors(opt, p)) and state_tensors(opt, p)


@each_shape
@each_optimizer
def test_state_that_was_changed_by_hand(build, dtype, shape):
    for key in state_keys(build, dtype):
        opt, params = started(build, dtype)
        p = params["matrix"]
        opt.state[p][key] = torch.zeros(shape, dtype=opt.state[p][key].dtype)
        give_gradients(opt, params.items())
        assert_refused(opt, params, "matrix", key, SHAPE, shape)


@each_shape
@each_optimizer
def test_gradient_of_another_shape(build, dtype, shape):
    "PyTorch refuses it where it is assigned, but `p.data` may be replaced afterwards."
    opt, params = started(build, dtype)
    give_gradients(opt, params.items())
    params["matrix"].grad.data = torch.randn(shape).to(dtype)
    assert_refused(opt, params, "matrix", "gradient", SHAPE, shape)


@each_shape
@pytest.mark.parametrize("kw", [{}, dict(momentum=0.0), dict(fused=True), dict(foreach=True)], ids=str)
def test_first_gradient_of_another_shape(kw, shape):
    "Before there is any state: nothing is measured, in no group."
    params = {name: nn.Parameter(torch.randn(SHAPE)) for name in ("first", "second")}
    opt = make(SGDSaI, **kw)(params.items())
    give_gradients(opt, params.items())
    params["second"].grad.data = torch.randn(shape)
    assert_refused(opt, params, "second", SHAPE, shape)
    assert not opt.state


@each_optimizer
def test_state_on_another_device(build, dtype):
    "`model.to(device)` leaves the state where it is."
    for key in state_keys(build, dtype):
        opt, params = started(build, dtype)
        p = params["matrix"]
        opt.state[p][key] = opt.state[p][key].to("meta")
        give_gradients(opt, params.items())
        assert_refused(opt, params, "matrix", key, "meta", "cpu")


@pytest.mark.parametrize("blocks", [0, 1, 2, 4], ids="{} blocks".format)
def test_scales_of_eight_bit_blocks(blocks):
    opt, params = started(*OPTIMIZERS["int8 state"])
    p = params["matrix"]
    needed = -(-p.numel() // BLOCK)
    assert needed == 3
    opt.state[p]["momentum_absmax"] = torch.ones(blocks)
    give_gradients(opt, params.items())
    assert_refused(opt, params, "matrix", "momentum_absmax", (blocks,), (needed,))


def test_scales_of_eight_bit_blocks_on_another_device():
    opt, params = started(*OPTIMIZERS["int8 state"])
    p = params["matrix"]
    opt.state[p]["momentum_absmax"] = opt.state[p]["momentum_absmax"].to("meta")
    give_gradients(opt, params.items())
    assert_refused(opt, params, "matrix", "momentum_absmax", "meta")


@pytest.mark.parametrize("missing", ["momentum_buffer", "compensation"])
def test_states_that_only_some_have_are_compared_too(missing):
    "A parameter that has lost an entry does not hide that another one does not fit."
    opt, params = started(*OPTIMIZERS["kahan" if missing == "compensation" else "SGDSaI"])
    del opt.state[params["first"]][missing]
    opt.state[params["matrix"]][missing] = torch.zeros(5, 50, dtype=params["matrix"].dtype)
    give_gradients(opt, params.items())
    assert_refused(opt, params, "matrix", missing, SHAPE, (5, 50))


@pytest.mark.parametrize("shape", [(20, 50), (5, 50)], ids=["grown", "shrunk"])
def test_steps_inside_the_backward_pass(shape):
    params = {name: nn.Parameter(torch.randn(SHAPE)) for name in ("first", "second")}
    opt = make(SGDSaI)(params.items())
    inside = StepInBackward(opt)

    def backward():
        inside.backward(sum(p.square().sum() for p in params.values()))

    backward()
    opt.state[params["second"]]["momentum_buffer"] = torch.zeros(shape)
    p, m = params["second"].detach().clone(), opt.state[params["second"]]["momentum_buffer"].clone()
    with pytest.raises(RuntimeError, match="second"):
        backward()
    assert torch.equal(params["second"], p) and torch.equal(opt.state[params["second"]]["momentum_buffer"], m)


@pytest.mark.parametrize("build", [make(SGDSaI, momentum=0.0), make(SGDSaI, lr=0.0)], ids=["no momentum", "rate of 0"])
def test_what_fits_is_not_refused(build):
    "A momentum that is not used any more, and parameters without a gradient, are of no concern."
    opt, params = started(*OPTIMIZERS["SGDSaI"])
    params["late"].data = torch.randn(3, 3)
    opt.param_groups[0]["momentum"] = 0.0
    give_gradients(opt, list(params.items())[:2])
    opt.step()
    opt, params = started(build, torch.float32)
    give_gradients(opt, params.items())
    opt.step()


def test_eight_bit_momentum_without_the_scales_of_its_blocks_is_refused():
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(4))
    opt = SGDSaI([("p", p), ("q", q)], state_dtype=torch.int8)
    for _ in range(2):
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        opt.step()
    del opt.state[q]["momentum_absmax"]
    before = p.detach().clone(), q.detach().clone()
    with pytest.raises(RuntimeError, match="the state of q does not fit: .*momentum_absmax.* is missing"):
        opt.step()
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])
