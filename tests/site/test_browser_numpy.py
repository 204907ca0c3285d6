"The stand-in for numpy that the site's exercise uses in a browser: each of its functions agrees with numpy's."

import importlib.util

import numpy
import pytest
from pages import ROOT

path = ROOT / ".ci" / "browser_numpy.py"
spec = importlib.util.spec_from_file_location("browser_numpy", path)
stand_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_in)

FUNCTIONS = {
    "array": lambda np, a, b: np.array([1, 2.5, -3]),
    "ndarray": lambda np, a, b: isinstance(np.array([1.0]), np.ndarray),
    "asarray": lambda np, a, b: np.asarray(a) + np.asarray([1, 2, 3, 4, 5, 6]),
    "zeros": lambda np, a, b: np.zeros(6) + b,
    "zeros_like": lambda np, a, b: np.zeros_like(a) - b,
    "copy": lambda np, a, b: np.copy(a),
    "sqrt": lambda np, a, b: np.sqrt(b * b) + np.sqrt(2),
    "square": lambda np, a, b: np.square(a) + np.square(3),
    "absolute": lambda np, a, b: np.absolute(a),
    "abs": lambda np, a, b: np.abs(a) + abs(b) + np.abs(-2),
    "dot": lambda np, a, b: np.dot(a, b),
    "size": lambda np, a, b: np.size(a),
    "sum": lambda np, a, b: np.sum(a),
    "mean": lambda np, a, b: np.mean(a),
    "var": lambda np, a, b: np.var(a) + np.var(b, ddof=1),
    "std": lambda np, a, b: np.std(a) + np.std(b, ddof=1),
    "linalg": lambda np, a, b: np.linalg.norm(a),
}
EXPRESSIONS = [
    "a + b",
    "a - b",
    "a * b",
    "a / b",
    "b**2 + (b * b) ** 0.5",
    "-a",
    "abs(a)",
    "2 + a",
    "2 - a",
    "2 * a",
    "2 / a",
    "2**a",
    "a + np.array([3])",
    "a @ b",
    "a.dot(b)",
    "a.sum() + a.mean() + a.std() + a.std(ddof=1) + a.var() + a.var(ddof=1)",
    "a.size + len(a) + a.shape[0] + a.ndim",
    "a.tolist()",
    "a[0] - a[-1]",
    "a[1:4]",
    "[2 * x for x in a]",
    "a.any() and not np.zeros(3).any()",
    "a.copy() / 3",
    "a / np.zeros_like(a)",
]
STATEMENTS = [
    "a += b",
    "a -= 2",
    "a *= b",
    "a /= b",
    "a **= 2",
    "a[2] = 7",
    "a[1:3] = 0",
    "a[:2] = [5, 6]",
    "c = a; c += 1",
    "c = a.copy(); c += 1",
    "c = a; c = c + 1",
]


def rows():
    "Two rows of random numbers, none near zero."
    generator = numpy.random.default_rng(0)
    return [generator.choice([-1, 1], 6) * generator.uniform(0.5, 2, 6) for _ in range(2)]


def both(function):
    "What a function gives with numpy, and with the stand-in, on the same numbers."
    return [function(np, *[np.array(list(row)) for row in rows()]) for np in (numpy, stand_in)]


def agree(values):
    expected, found = (value if isinstance(value, (bool, float, int)) else list(value) for value in values)
    numpy.testing.assert_allclose(found, expected, rtol=1e-12)


def test_every_function_has_a_case():
    public = {name for name in vars(stand_in) if not name.startswith("_")} - {"math", "OPERATIONS"}
    assert public == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    agree(both(FUNCTIONS[name]))


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_expressions(expression):
    agree(both(lambda np, a, b: eval(expression, {"np": np, "a": a, "b": b})))


@pytest.mark.parametrize("statement", STATEMENTS)
def test_what_changes_an_array(statement):
    def changed(np, a, b):
        names = {"np": np, "a": a, "b": b, "c": b}
        kept = names["a"]
        exec(statement, names)
        return [*kept, *names["a"], *names["c"]]

    agree(both(changed))


@pytest.mark.parametrize("np", [numpy, stand_in])
def test_mistakes_are_errors(np):
    with pytest.raises(ValueError, match="broadcast"):
        np.array([1.0, 2.0]) + np.array([1.0, 2.0, 3.0])
    with pytest.raises((TypeError, ValueError)):
        bool(np.array([1.0, 2.0]) == np.array([1.0, 2.0]))


def test_arrays_can_be_read():
    assert repr(stand_in.array([1, 0.5])) == "array([1, 0.5])" and str(stand_in.array([1, 0.5])) == "[1 0.5]"
