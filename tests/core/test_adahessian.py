"AdaHessian beside the arithmetic and the checkpoints of the released code, and every option in plain Python."

import io

import pytest
import torch
import torch.nn.functional as F
from adahessian_shared import (
    SHAPES,
    Released,
    coming_signs,
    one_step,
    plain_average,
    products,
    small_data,
    small_net,
    uneven,
)
from common import (
    ConvNet,
    TransformerBlock,
    assert_same_path,
    param,
    same_start,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgd_sai.adahessian import AdaHessian

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]


def loss_of(model, batch):
    x, y = batch
    with sdpa_kernel(SDPBackend.MATH):
        return F.cross_entropy(model(x), y)


def two_groups(model):
    "Matrices and the rest, which share no hyperparameter."
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 0.04, "weight_decay": 0.1, "eps": 0.01},
        {
            "params": [p for p in model.parameters() if p.ndim <= 1],
            "lr": 0.05,
            "betas": (0.8, 0.95),
            "eps": 0.1,
            "hessian_power": 0.5,
        },
    ]


def beside_released(model_class, opt, model, reference, exact, n):
    "The parameters after each of n steps of both, which get the same float32 gradients and products."
    torch.manual_seed(1)
    position = dict(zip(model.parameters(), exact.parameters(), strict=True))
    mine, theirs = [], []
    for _ in range(n):
        opt.zero_grad()
        loss_of(model, model_class.batch()).backward(create_graph=True)
        Hz = products(coming_signs(opt)[0])
        for p, q in position.items():
            q.grad = p.grad.detach().to(q.dtype)
        reference.step({position[p]: h.to(q.dtype) for p, h in Hz.items()})
        opt.step()
        for track, net in ((mine, model), (theirs, exact)):
            track.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return mine, theirs


@pytest.mark.parametrize("model_class", [ConvNet, TransformerBlock])
def test_twenty_steps_equal_the_released_arithmetic(model_class):
    model, exact = same_start(model_class), same_start(model_class).double()
    opt, reference = AdaHessian(two_groups(model)), Released(two_groups(exact))
    mine, theirs = beside_released(model_class, opt, model, reference, exact, 20)
    assert_same_path(mine, theirs)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        for key in ("exp_avg", "exp_hessian_diag_sq"):
            value = reference.state[q][key]
            assert (opt.state[p][key] - value).abs().max() <= 1e-6 * value.abs().max()
        assert opt.state[p]["step"] == opt.state[p]["hessian_step"] == reference.state[q]["step"] == 20


@pytest.mark.parametrize("done", [1, 6])
@pytest.mark.parametrize("model_class", [ConvNet, TransformerBlock])
def test_released_checkpoints_continue(model_class, done):
    trained, theirs = same_start(model_class), same_start(model_class)
    reference = Released(two_groups(theirs))
    beside_released(model_class, AdaHessian(two_groups(trained)), trained, reference, theirs, done)
    file = io.BytesIO()
    torch.save({"model": theirs.state_dict(), "optimizer": reference.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = model_class()
    model.load_state_dict(saved["model"])
    opt = AdaHessian([{"params": group["params"]} for group in two_groups(model)])
    opt.load_state_dict(saved["optimizer"])
    assert [group["lr"] for group in opt.param_groups] == [0.04, 0.05] and all(
        opt.defaults.keys() <= group.keys() for group in opt.param_groups
    )
    for p in model.parameters():
        state = opt.state[p]
        assert state["step"] == state["hessian_step"] == done and all(
            isinstance(state[key], torch.Tensor) for key in ("step", "hessian_step")
        )
        assert state["exp_hessian_diag_sq"].shape == (
            p.shape[:2] + (1, 1) if p.ndim == 4 else p.shape
        )  # theirs has the parameter's shape
    exact = theirs.double()  # the same parameters, so the same optimizer goes on; only its state has to follow
    for state in reference.state.values():
        state.update({key: value.double() for key, value in state.items() if key != "step"})
    mine, theirs = beside_released(model_class, opt, model, reference, exact, 10)
    assert_same_path(mine, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(block_size=4),
        dict(signed_average=True),
        dict(signed_average=True, block_size=7),
        dict(average_window=False),
        dict(n_samples=3),
        dict(n_samples=2, signed_average=True),
        dict(hessian_power=0.5),
        dict(hessian_power=0.0),
        dict(maximize=True),
        dict(weight_decay=0.0),
    ],
    ids=str,
)
def test_every_option_equals_plain_arithmetic_in_zero_to_five_dimensions(options):
    params = [param(*shape) for shape in SHAPES]
    opt = AdaHessian(params, **{**dict(lr=0.05, weight_decay=0.1, eps=0.01), **options})
    exact, m, v = [p.detach().double() for p in params], [0.0] * len(params), [0.0] * len(params)
    averaging = {key: options[key] for key in ("block_size", "average_window", "signed_average") if key in options}
    sign, k = -1 if options.get("maximize") else 1, options.get("hessian_power", 1)
    for t in range(1, 9):
        opt.zero_grad()
        uneven(params).backward(create_graph=True)
        samples = [
            [(z[p] * h).double() for p, h in products(z).items()]
            for z in coming_signs(opt, options.get("n_samples", 1))
        ]
        for i, p in enumerate(params):
            D = plain_average(sum(sample[i] for sample in samples) / len(samples), **averaging)
            m[i], v[i] = 0.9 * m[i] + 0.1 * p.grad.double().detach(), 0.999 * v[i] + 0.001 * D**2
            u = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() ** k + 0.01)
            exact[i] = exact[i] - 0.05 * (sign * u + options.get("weight_decay", 0.1) * exact[i])
        opt.step()
        for p, q in zip(params, exact, strict=True):
            assert (p - q).abs().max() <= 2e-6 * q.abs().max()
    for p in params:
        assert opt.state[p]["exp_hessian_diag_sq"].shape == (
            p.shape[:2] + (1,) * (p.ndim - 2) if p.ndim > 2 and options.get("average_window", True) else p.shape
        )


@pytest.mark.parametrize("kw", [{}, dict(state_dtype=torch.float32)], ids=str)
def test_sixteen_bit_parameters_are_computed_in_float32_and_rounded_once(kw):
    params = [param(*shape, dtype=torch.bfloat16) for shape in SHAPES]
    opt, half = AdaHessian(params, lr=0.05, weight_decay=0.1, eps=0.01, betas=(0.9, 0.9), **kw), 2.0**-8
    stored = torch.finfo(kw.get("state_dtype", torch.bfloat16)).eps
    for t in range(1, 6):
        opt.zero_grad()
        sum((p**4 / 4 + p**2).sum() for p in params).backward(create_graph=True)
        Hz = products(coming_signs(opt)[0])
        old = [
            (
                p.detach().double(),
                *(opt.state[p][key].double() if t > 1 else 0.0 for key in ("exp_avg", "exp_hessian_diag_sq")),
            )
            for p in params
        ]
        opt.step()
        for p, (before, m, v) in zip(params, old, strict=True):
            g, state = p.grad.double(), opt.state[p]
            m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * plain_average(Hz[p].double()) ** 2
            for mine, exact in ((state["exp_avg"], m), (state["exp_hessian_diag_sq"], v)):
                assert mine.dtype == kw.get("state_dtype", torch.bfloat16)
                assert (
                    (mine - exact).abs() <= (stored + (2 * half if mine.ndim > 2 else 1e-5)) * exact.abs() + 1e-5
                ).all()  # a window's mean is rounded as well
            v = state["exp_hessian_diag_sq"].double()
            expected = before - 0.05 * (m / (1 - 0.9**t) / ((v / (1 - 0.9**t)).sqrt() + 0.01) + 0.1 * before)
            assert ((p - expected).abs() <= half * (expected.abs() + 0.05)).all()


def test_one_step_on_a_diagonal_quadratic_is_newtons():
    for shape in SHAPES:
        curvature = (
            torch.rand(shape[:2] + (1,) * (len(shape) - 2)) * 50 + 0.1
        )  # one for each window, where there are windows
        p = param(*shape)
        opt = AdaHessian([p], lr=1, betas=(0, 0), eps=0)
        (curvature * p**2).sum().div(2).backward(create_graph=True)
        opt.step()
        assert p.abs().max() < 1e-6


def test_nothing_is_printed(capfd):
    net, (x, y) = small_net(), (t.float() for t in small_data())
    opt = AdaHessian(net.parameters(), update_period=2, block_size=4)
    for _ in range(3):
        one_step(net, opt, x, y, "ordinary")
    opt.load_state_dict(opt.state_dict())
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""
