"""How far the result of a formula may be off in floats, by the formula itself.

The formula runs on arrays of `Counted`. A `Counted` stands for one number. It holds the
sum of the absolute values of the number's terms, and the number of roundings on the
longest way from the inputs to the number. The computed result then errs by at most
gamma(roundings) times that sum (Higham, section 3.1), in every order of summation.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from tests.tolerance import assert_within, gamma


@dataclass(frozen=True)
class Counted:
    """The size of a number, and the roundings behind it; a plain number is exact.

    For a formula that treats each value alone, `size` may be an array.
    """

    size: Any
    roundings: int = 0

    def __add__(self, other):
        size, n = _read(other)
        return Counted(self.size + size, max(self.roundings, n) + 1)

    def __mul__(self, other):
        size, n = _read(other)
        return Counted(self.size * size, self.roundings + n + 1)

    def __truediv__(self, other):
        # A counted divisor is a sum of positive terms, so its size is its value.
        size, n = _read(other)
        return Counted(self.size / size, self.roundings + n + 1)

    def sqrt(self):
        # Of a sum of positive terms: the root halves a relative error.
        return Counted(self.size**0.5, -(-self.roundings // 2) + 1)

    def tanh(self):
        # Slope and value are at most those of the argument. NumPy and torch compute
        # tanh to 2 last bits, which are 4 roundings.
        return Counted(self.size, self.roundings + 4)

    def __gt__(self, other):  # ReLU keeps every term: its slope is at most 1
        return True

    def conjugate(self):
        return self

    __radd__ = __sub__ = __rsub__ = __add__
    __rmul__ = __mul__
    __ge__ = __gt__


Real.register(Counted)  # an operand of the formulas, as fractions are


def _read(other):
    if isinstance(other, Counted):
        return other.size, other.roundings
    return abs(float(other)), 0


def counted(array, roundings=0):
    """Return the operand as sizes; its values have had so many roundings before."""
    found = np.empty(array.shape, object)
    for i, value in np.ndenumerate(array):
        found[i] = Counted(abs(float(value)), roundings)
    return found


def roundings(result):
    """Return the largest number of roundings on a way to any number of a result."""
    return max((_read(c)[1] for c in np.asarray(result).flat), default=0)


def bound(result, dtype="float32"):
    """Return how far each number of a computed `result` may be from the exact one."""
    if isinstance(result, Counted):
        return gamma(result.roundings, dtype) * result.size
    size = np.vectorize(lambda c: _read(c)[0], otypes=[float])(result)
    return gamma(roundings(result), dtype) * size


def assert_both_within(one, other, *formulas, dtype="float32"):
    """Check that two results differ by at most the sum of both formulas' bounds."""
    allowed = sum(bound(formula, dtype) for formula in formulas)
    assert_within(one, other, allowed)
