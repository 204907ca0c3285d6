"Mistakes that readers make when they write a step of SGD-SaI: each is found, and named for what it is."

import numpy as np
import pytest
import torch

from sgd_sai import SGDSaI
from sgd_sai.explore.written_step import PARTS, judge_step, wrong_parts

THETA = [1.0, -2.0, 0.5, 3.0, -1.0, 2.0]
GRADIENTS = np.random.default_rng(0).standard_normal((4, 6)).astype("float32").tolist()


def recorded(momentum, weight_decay):
    "What SGDSaI does."
    parameter, thetas = torch.nn.Parameter(torch.tensor(THETA)), []
    optimizer = SGDSaI([parameter], lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for g in GRADIENTS:
        parameter.grad = torch.tensor(g)
        optimizer.step()
        thetas.append(parameter.tolist())
    return {"momentum": momentum, "weight_decay": weight_decay, "thetas": thetas}


EXPECTED = {
    "lr": 0.1,
    "theta": THETA,
    "gradients": GRADIENTS,
    "runs": {"scale": recorded(0.0, 0.0), "momentum": recorded(0.9, 0.0), "decay": recorded(0.0, 0.1)},
}
RIGHT = """
def step(theta, g, state, lr, momentum, weight_decay):
    if not state:
        state["G"] = np.linalg.norm(g) / g.std(ddof=1)
        state["m"] = g
    state["m"] = momentum * state["m"] + (1 - momentum) * g
    theta = theta * (1 - lr * weight_decay)
    return theta - lr * state["G"] * state["m"]
"""
MISTAKES = [
    ("step", "return theta - lr", "return theta + lr", "against"),
    ("step", "return theta - lr *", "return theta - 0.1 *", "twice"),
    ("step", 'return theta - lr * state["G"] * state["m"]', "return theta", "stays where it is"),
    ("step", '* state["m"]\n', '* np.sign(state["m"])\n', "multiple"),
    ("scale", "ddof=1", "", "ddof=1"),
    ("scale", "np.linalg.norm(g) / g.std(ddof=1)", "1", "G is 1,"),
    ("scale", "np.linalg.norm(g) / g.std(ddof=1)", "np.sqrt(g.size)", "G is 2.449"),
    ("scale", "    if not state:\n", '    state["m"] = state.get("m", g)\n    if True:\n', "Measure it once"),
    ("momentum", 'momentum * state["m"] + (1 - momentum) * g', "g", "forgotten"),
    ("momentum", 'state["m"] = g\n', 'state["m"] = 0 * g\n', "starts at zero"),
    ("momentum", "(1 - momentum) * g", "g", "becomes"),
    ("decay", " * (1 - lr * weight_decay)", "", "forgotten"),
    ("decay", "(1 - lr * weight_decay)", "(1 - weight_decay)", "multiplied by"),
    ("decay", "(1 - lr * weight_decay)", '(1 - lr * state["G"] * weight_decay)', "without G"),
]


def step_from(source):
    "The function that a text defines."
    names = {"np": np}
    exec(source, names)
    return names["step"]


def test_a_right_step_is_right(capsys):
    step = step_from(RIGHT)
    assert wrong_parts(step, EXPECTED) == dict.fromkeys(PARTS)
    judge_step(step, EXPECTED)
    assert "all four parts right" in capsys.readouterr().out


@pytest.mark.parametrize(("part", "right", "wrong", "hint"), MISTAKES)
def test_a_mistake_is_found_in_its_part(part, right, wrong, hint):
    assert right in RIGHT
    found = wrong_parts(step_from(RIGHT.replace(right, wrong)), EXPECTED)
    assert [name for name, what in found.items() if what] == [part] and hint in found[part]


def test_a_step_may_change_what_it_gets():
    in_place = RIGHT.replace("theta = theta * (", "theta *= (").replace(
        "return theta -", "theta -= lr * 0; return theta -"
    )
    assert wrong_parts(step_from(in_place), EXPECTED) == dict.fromkeys(PARTS)


def test_momentum_and_decay_wait_for_the_scale(capsys):
    judge_step(step_from(RIGHT.replace("ddof=1", "")), EXPECTED)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:4]] == ["right", "wrong:", "waits", "waits"]
    assert lines[4] == "1 of 4 parts right"


@pytest.mark.parametrize(("end", "message"), [("pass", "returns nothing"), ("return theta[:2]", "returns 2 numbers")])
def test_what_is_no_parameter_is_refused(end, message):
    with pytest.raises(TypeError, match=message):
        wrong_parts(step_from(RIGHT + f"\n\ndef step(theta, *others):\n    {end}\n"), EXPECTED)


def test_not_written_yet(capsys):
    judge_step(step_from("def step(*values):\n    raise NotImplementedError"), EXPECTED)
    assert capsys.readouterr().out == "not written yet\n"
