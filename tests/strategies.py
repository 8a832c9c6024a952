"""Drawn inputs for the laws: sizes, tensors, and adapted layers.

There are three kinds of numbers, one for each meaning of "exact": fractions (no
rounding at all), small integers with power-of-two scalings (every float32 sum is exact,
in any order), and normal numbers (a derived bound).
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

seeds = st.integers(0, 2**32 - 1)
blocksizes = st.sampled_from([2**k for k in range(13)])


@dataclass(frozen=True)
class Layer:
    """An adapted layer for a test, without special cases.

    W is not square, B is not zero, scaling is neither 0 nor 1.
    """

    x: np.ndarray
    W: np.ndarray
    bias: np.ndarray | None
    A: np.ndarray
    B: np.ndarray
    scaling: object
    grad_y: np.ndarray


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a layer: in, out, rank, and the leading axes of x."""

    k: int
    d: int
    r: int
    lead: tuple[int, ...]


@st.composite
def sizes(draw, largest=9):
    k = draw(st.integers(1, largest))
    d = draw(st.integers(1, largest).filter(lambda d: d != k))
    r = draw(st.integers(1, min(k, d)))
    lead = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    return Sizes(k, d, r, lead)


@st.composite
def _layers(draw, tensor, scalings):
    s = draw(sizes())
    B = draw(tensor((s.d, s.r)).filter(lambda B: np.any(B != 0)))
    return Layer(
        x=draw(tensor((*s.lead, s.k))),
        W=draw(tensor((s.d, s.k))),
        bias=draw(st.none() | tensor((s.d,))),
        A=draw(tensor((s.r, s.k))),
        B=B,
        scaling=draw(scalings),
        grad_y=draw(tensor((*s.lead, s.d))),
    )


# Arrays are made from one drawn seed. If hypothesis drew each element, it would need a
# hundred times as long as the checks. Hypothesis can still shrink the sizes.


@st.composite
def rationals(draw, shape):
    """Draw arrays of fractions, on which a formula runs without rounding."""
    rng = np.random.default_rng(draw(seeds))
    top, bottom = rng.integers(-40, 41, shape), rng.integers(1, 13, shape)
    values = [
        Fraction(int(t), int(b)) for t, b in zip(top.flat, bottom.flat, strict=True)
    ]
    array = np.empty(shape, object)
    array.reshape(-1)[:] = values
    return array


@st.composite
def integers(draw, shape):
    """Draw float32 integers up to 8; sums of products stay below 2**24, so exact."""
    rng = np.random.default_rng(draw(seeds))
    return rng.integers(-8, 9, shape).astype(np.float32)


@st.composite
def gaussians(draw, shape):
    """Draw normal float32 values of mixed magnitude."""
    rng = np.random.default_rng(draw(seeds))
    size = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    return (rng.standard_normal(shape) * size).astype(np.float32)


POWERS_OF_TWO = [0.125, 0.25, 0.5, 2.0, 4.0, 8.0]

rational_layers = _layers(
    rationals,
    st.sampled_from([Fraction(a, r) for a, r in ((1, 3), (16, 6), (2, 1), (-5, 7))]),
)
integer_layers = _layers(integers, st.sampled_from(POWERS_OF_TWO))
gaussian_layers = _layers(gaussians, st.sampled_from([0.3, 1.7, 2.0, 32.0]))


@st.composite
def weights(draw, max_size=700):
    """Draw finite float32 weights for quantizers: any shape, zeros, outliers."""
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, max_size)),
            st.tuples(st.integers(1, 24), st.integers(1, 24)),
            st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9)),
        )
    )
    rng = np.random.default_rng(draw(seeds))
    scale = draw(st.sampled_from([2.0**-20, 0.02, 1.0, 2.0**60]))
    W = (rng.standard_normal(shape) * scale).astype(np.float32)
    if draw(st.booleans()):  # whole blocks of zeros, and single ones
        W.reshape(-1)[: W.size // 2] = 0
    if draw(st.booleans()):  # an outlier sets the scale of its block
        W.reshape(-1)[rng.integers(W.size)] *= 50
    return W


def anything_finite(shape):
    """Draw any finite float32 values, subnormal and largest ones included."""
    return hnp.arrays(
        np.float32,
        shape,
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
