"Rules for the rest by hand: directions, rows, absent rows, numbers of any size, the table of roles, what is refused."

import math

import pytest
import torch
from rest_optimizer import RULES, USED, reference_steps

from sgd_sai.rest_rules import (
    ADAMS_BETA,
    REST_BY_ROLE,
    REST_RULES,
    ROW_FLOOR,
    adams_direction,
    check_rest,
    dims_of_rows,
    rest_reference,
    rest_settings,
    row_norm_direction,
)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize(
    "rest, nesterov, expected",
    [
        # gradients 2, -1: m is 1, then 0; u with Nesterov's form is 1.5, then -0.5
        ("sign", False, [10 - 0.1, 10 - 0.1]),
        ("sign", True, [10 - 0.1, 10 - 0.1 + 0.1]),
        ("row_norm", False, [10 - 0.1, 10 - 0.1]),
        ("row_norm", True, [10 - 0.1, 10 - 0.1 + 0.1]),
        ("adams", False, [10 - 0.1 / math.sqrt(0.05 * 4), 10 - 0.1 / math.sqrt(0.05 * 4)]),
    ],
)
def test_two_steps_by_hand(rest, nesterov, expected):
    theta, state = torch.tensor([10.0], dtype=torch.float64), {}
    for g, value in zip((2.0, -1.0), expected, strict=True):
        g = torch.tensor([g], dtype=torch.float64)
        theta = rest_reference(rest, theta, g, state, lr=0.1, mu=0.5, nesterov=nesterov, eps=0.0)
        assert theta.item() == pytest.approx(value, abs=1e-12)


def test_decay_comes_first_and_uphill_turns_the_step_alone():
    theta, g = torch.tensor([10.0]), torch.tensor([1.0])
    down = rest_reference("sign", theta, g, {}, lr=0.1, weight_decay=0.5)
    up = rest_reference("sign", theta, g, {}, lr=0.1, weight_decay=0.5, maximize=True)
    assert down.item() == pytest.approx(9.5 - 0.1) and up.item() == pytest.approx(9.5 + 0.1)


@pytest.mark.parametrize(
    "shape, layout, rows",
    [
        ((4, 3), {}, lambda t: list(t)),
        ((4, 3), dict(transposed=True), lambda t: list(t.T)),
        ((4, 3, 2, 2), {}, lambda t: list(t)),
        ((4, 3, 5), dict(stacked=True), lambda t: list(t.reshape(-1, 5))),
        ((4, 3, 5), dict(stacked=True, transposed=True), lambda t: list(t.mT.reshape(-1, 3))),
        ((2, 4, 3, 5), dict(stacked=True), lambda t: list(t.reshape(-1, 5))),
        ((6,), {}, lambda t: [t]),
        ((6,), dict(stacked=True, transposed=True), lambda t: [t]),
        ((), {}, lambda t: [t]),
    ],
)
def test_rows_of_each_layout(shape, layout, rows):
    u, g = torch.randn(shape), torch.randn(shape)
    for row in rows(row_norm_direction(u, g, **layout)):
        assert row.square().mean().sqrt().item() == pytest.approx(1, abs=1e-5)
    assert len(rows(u)) * math.prod(shape[d] for d in dims_of_rows(len(shape), **layout)) == u.numel()


def test_a_small_row_is_held_down_by_the_floor():
    u = torch.ones(100, 4)
    u[0] = 1e-3
    d = row_norm_direction(u, torch.ones(100, 4))
    assert d[1:].allclose(torch.ones(99, 4)) and d[0, 0].item() == pytest.approx(
        1e-3 / (ROW_FLOOR * 0.99**0.5), rel=1e-3
    )


def test_an_absent_row_stays_where_it_is():
    theta, state = torch.randn(5, 3), {}
    for t in range(30):
        g = torch.randn(5, 3)
        g[1:3] = 0 if t else g[1:3]
        before = theta
        theta = rest_reference("row_norm", theta, g, state, lr=0.1, nesterov=True)
        assert torch.equal(theta[1:3], before[1:3]) == (t > 0) and not (theta[[0, 3, 4]] == before[[0, 3, 4]]).any()
    assert state["momentum_buffer"][1:3].any()  # it goes on forgetting


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e25])
@pytest.mark.parametrize("shape", [(30, 20), (77,)])
def test_rows_of_any_size_step_alike(size, shape):
    thetas, grads = [torch.randn(shape)], [[torch.randn(shape)] for _ in range(5)]
    ends = [reference_steps(thetas, [[factor * g] for (g,) in grads], rest="row_norm")[0][0] for factor in (1.0, size)]
    torch.testing.assert_close(*ends)


def test_adams_comes_to_one_with_steady_gradients_and_does_not_stop_without():
    m, path = torch.zeros(()), []
    for t in range(100):
        g = torch.tensor(float(t < 60))
        before, m = m, 0.9 * m + 0.1 * g
        path.append(adams_direction(before, m, g, 1e-8).item())
    assert path[59] == pytest.approx(1, abs=0.01) and path[61] == pytest.approx(0.9 / ADAMS_BETA**0.5, abs=1e-4)


def test_the_table_names_known_rules_for_each_role():
    for rest, roles in REST_BY_ROLE.items():
        assert roles.keys() == {"embedding", "head", "vector"}
        for role in roles:
            settings = rest_settings(rest, role, torch.empty(12, 8))
            assert settings.keys() == {"rest", "momentum", "nesterov", "lr_factor"}
            assert settings["rest"] in REST_RULES and settings["lr_factor"] > 0
            check_rest(USED | settings)
    assert REST_BY_ROLE.keys() - {"scion"} == {*REST_RULES}
    rates = {rest: rest_settings(rest, "embedding", torch.empty(1, 1))["lr_factor"] for rest in REST_RULES}
    assert rates == {"sgd_sai": 1.5, "sign": 0.05, "row_norm": 0.06, "adams": 0.15}


@pytest.mark.parametrize("shape, layout", [((50, 8), {}), ((8, 50), dict(transposed=True)), ((50, 2, 2, 2), {})])
def test_the_head_of_scion_is_divided_by_its_inputs(shape, layout):
    settings = rest_settings("scion", "head", torch.empty(shape), **layout)
    assert settings == dict(rest="sign", momentum=0.9, nesterov=False, lr_factor=60 / 8)


def test_an_entry_of_the_table_is_not_handed_out():
    rest_settings("sign", "head", torch.empty(2, 2))["lr_factor"] = 7.0
    assert REST_BY_ROLE["sign"]["head"]["lr_factor"] == 0.05


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        (dict(rest="adamw"), ValueError, "'adamw'.*'sgd_sai', 'sign', 'row_norm', 'adams'"),
        (dict(rest="adams", nesterov=True), ValueError, "nesterov=False"),
        (dict(rest="adams", eps=0.0), ValueError, "eps"),
        (dict(rest="row_norm", params=[torch.zeros(2, dtype=torch.complex64)]), ValueError, "complex"),
        (dict(rest="sign", fused=True), RuntimeError, "`fused`.*'sign'"),
        (dict(rest="sign", differentiable=True), RuntimeError, "`differentiable`.*'sign'"),
    ],
)
def test_what_is_refused(wrong, error, words):
    with pytest.raises(error, match=words):
        check_rest(USED | wrong)
    with pytest.raises(ValueError, match="'adamw'.*'scion'"):
        rest_settings("adamw", "head", torch.empty(2, 2))


def test_what_is_not_refused():
    for rest, nesterov in RULES:
        check_rest(USED | dict(rest=rest, nesterov=nesterov))
    check_rest(USED | dict(rest="sgd_sai", fused=True))
    check_rest(USED | dict(rest="sign", params=[torch.zeros(2, dtype=torch.complex64)]))
