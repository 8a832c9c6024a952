"""How far a formula may be off in floats: the formula itself says it.

The reference runs on arrays of `Counted`: each stands for a number by the sum of its
terms' absolute values, and by how many roundings the longest way to it has. A result
in floats then errs by at most gamma(roundings) times that sum (Higham, section 3.1),
in whatever order its sums are taken.
"""

from dataclasses import dataclass

import numpy as np

from tests.tolerance import assert_within, gamma


@dataclass(frozen=True)
class Counted:
    """The size of a value, and the roundings behind it; a plain number is exact."""

    size: float
    roundings: int = 0

    def __add__(self, other):
        size, n = _read(other)
        return Counted(self.size + size, max(self.roundings, n) + 1)

    def __mul__(self, other):
        size, n = _read(other)
        return Counted(self.size * size, self.roundings + n + 1)

    def __truediv__(self, exact):
        return Counted(self.size / abs(float(exact)), self.roundings + 1)

    def __gt__(self, other):  # ReLU lets every term through: its slope is at most 1
        return True

    def conjugate(self):
        return self

    __radd__ = __sub__ = __rsub__ = __add__
    __rmul__ = __mul__
    __ge__ = __gt__


def _read(other):
    if isinstance(other, Counted):
        return other.size, other.roundings
    return abs(float(other)), 0


@np.vectorize(otypes=[object])
def _counted(value):
    return Counted(abs(float(value)))


def counted(array):
    """Return the operand whose values carry their size and no rounding yet."""
    return _counted(array) if array.size else array.astype(object)


def roundings(result):
    """Return how many roundings the longest way to any number of a result has."""
    return max((_read(c)[1] for c in np.asarray(result).flat), default=0)


def bound(result, dtype="float32"):
    """Return how far each number of a computed `result` may be from the exact one."""
    size = np.vectorize(lambda c: _read(c)[0], otypes=[float])(result)
    return gamma(roundings(result), dtype) * size


def assert_both_within(one, other, *formulas, dtype="float32"):
    """Two results may differ by what each of their formulas allows."""
    allowed = sum(bound(formula, dtype) for formula in formulas)
    assert_within(one, other, allowed)
