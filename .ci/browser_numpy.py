"""What the exercise of the site needs of numpy, in plain Python, for Brython: rows of floats and their arithmetic.

numpy itself, compiled for browsers, is larger than this site and would have to come from another host.
"""

import math


class ndarray:
    "A row of floats, with numpy's arithmetic for rows of equal length and for numbers."

    ndim = 1
    __eq__ = None  # no comparisons: an error is better than the answer of plain Python

    def __init__(self, values):
        self._values = [float(value) for value in values]

    @property
    def size(self):
        return len(self._values)

    @property
    def shape(self):
        return (self.size,)

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(self._values)

    def __getitem__(self, key):
        found = self._values[key]
        return ndarray(found) if isinstance(key, slice) else found

    def __setitem__(self, key, value):
        self._values[key] = self[key]._matching(value) if isinstance(key, slice) else float(value)

    def __repr__(self):
        return f"array([{', '.join(f'{value:.8g}' for value in self)}])"

    def __str__(self):
        return f"[{' '.join(f'{value:.8g}' for value in self)}]"

    def __neg__(self):
        return self * -1

    def __abs__(self):
        return absolute(self)

    def __matmul__(self, other):
        return dot(self, other)

    def copy(self):
        return ndarray(self)

    def tolist(self):
        return list(self)

    def sum(self):
        return math.fsum(self)

    def mean(self):
        return self.sum() / self.size

    def var(self, ddof=0):
        return square(self - self.mean()).sum() / (self.size - ddof)

    def std(self, ddof=0):
        return self.var(ddof) ** 0.5

    def any(self):
        return any(self._values)

    def dot(self, other):
        return dot(self, other)

    def _matching(self, other):
        "The values of the other side of an operation, as many as there are here."
        if isinstance(other, (int, float)):
            return [float(other)] * self.size
        values = list(other)
        if len(values) not in (1, self.size):
            raise ValueError(f"operands could not be broadcast together with shapes ({self.size},) ({len(values)},)")
        return values * self.size if len(values) == 1 else values

    def _with(self, other, operation):
        return ndarray(operation(a, b) for a, b in zip(self, self._matching(other), strict=True))

    def _changed(self, other, operation):
        "The same row with new values: what `+=` and its kind do."
        self._values = self._with(other, operation)._values
        return self


def _divided(a, b):
    "a / b, with inf or nan where Python raises an error."
    if b:
        return a / b
    return a * math.copysign(math.inf, b)


OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "truediv": _divided,
    "pow": lambda a, b: a**b,
}


def _add_operator(name, operation):
    "The methods of ndarray for `a + b`, for `b + a` and for `a += b`."
    setattr(ndarray, f"__{name}__", lambda self, other: self._with(other, operation))
    setattr(ndarray, f"__r{name}__", lambda self, other: self._with(other, lambda a, b: operation(b, a)))
    setattr(ndarray, f"__i{name}__", lambda self, other: self._changed(other, operation))


for _name, _operation in OPERATIONS.items():
    _add_operator(_name, _operation)


def array(values):
    return ndarray(values)


def asarray(values):
    return values if isinstance(values, ndarray) else ndarray(values)


def zeros(size):
    return ndarray([0] * size)


def zeros_like(a):
    return zeros(len(a))


def copy(a):
    return ndarray(a)


def _of_each(a, function):
    "A function of every entry, or of a number."
    return function(a) if isinstance(a, (int, float)) else ndarray(map(function, a))


def sqrt(a):
    return _of_each(a, lambda value: value**0.5 if value >= 0 else math.nan)


def square(a):
    return _of_each(a, lambda value: value * value)


def absolute(a):
    return _of_each(a, math.fabs)


abs = absolute


def dot(a, b):
    return (asarray(a) * b).sum()


def size(a):
    return len(a)


def sum(a):
    return asarray(a).sum()


def mean(a):
    return asarray(a).mean()


def var(a, ddof=0):
    return asarray(a).var(ddof)


def std(a, ddof=0):
    return asarray(a).std(ddof)


class linalg:
    "The part of numpy with this name."

    @staticmethod
    def norm(a):
        return dot(a, a) ** 0.5
