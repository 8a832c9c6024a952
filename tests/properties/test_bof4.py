"""Laws of BOF4-S."""

from math import erf, pi, sqrt

import numpy as np
from hypothesis import given

from minipeft.reference import blockwise, bof4
from minipeft.reference.codebook import NF4
from tests.strategies import blocksizes, weights
from tests.tolerance import assert_bits, gamma


@given(weights(), blocksizes)
def test_the_largest_value_of_a_block_is_its_scale_and_has_the_code_of_one(W, b):
    q = bof4.quantize(W, b)
    plain = blockwise.quantize(W, NF4, b)
    assert_bits(np.abs(q.absmax), plain.absmax)
    codes = blockwise.unpack(q.packed, 4, W.size)
    for i, scale in enumerate(q.absmax):
        block = W.reshape(-1)[i * b : (i + 1) * b].astype(np.float32)
        first = int(np.abs(block).argmax())
        assert scale == block[first]
        assert codes[i * b + first] == (15 if scale else 7)


@given(weights(), blocksizes)
def test_codes_do_not_change_with_the_sign_of_a_weight(W, b):
    q, negated = bof4.quantize(W, b), bof4.quantize(-W, b)
    assert_bits(negated.packed, q.packed)
    assert_bits(negated.absmax + 0, -q.absmax + 0)


@given(weights(), blocksizes)
def test_a_decoded_value_is_the_nearest_that_the_codebook_has(W, b):
    q = bof4.quantize(W, b)
    decoded = blockwise.dequantize(q).reshape(-1)
    scales = np.repeat(q.absmax, b)[: W.size]
    values, exact = bof4.BOF4_S.astype(float), W.reshape(-1).astype(float)
    best = np.abs(values * scales[:, None].astype(float) - exact[:, None]).min(axis=1)
    # The reciprocal, its product and the midpoint move a boundary by at most gamma(3)
    # of the scale, so the chosen value is worse by at most twice that. The decoded
    # product is rounded once, and so is each of these differences.
    slack = gamma(8) * np.abs(scales) + 2.0**-149
    assert np.all(np.abs(decoded - exact) <= best + slack)


def test_the_table_is_a_fixed_point_of_the_least_squared_error():
    # Each value but 0 and 1 is the mean of the numbers that are rounded to it. A block
    # holds 64 normal numbers and a is its absmax; the factor a**2 turns the error of
    # scaled numbers into the error of the weights.
    nodes, shares = np.polynomial.legendre.leggauss(300)
    a, shares = 4.5 * (nodes + 1), 4.5 * shares
    inside = np.array([erf(t / sqrt(2)) for t in a])
    peak = np.exp(-a * a / 2) / sqrt(2 * pi)
    weight = shares * inside**62 * peak * a**2

    def mass(x: float) -> float:
        return float((weight * [0.5 * erf(x * t / sqrt(2)) for t in a]).sum())

    def moment(x: float) -> float:
        return float((weight * (1 - np.exp(-((x * a) ** 2) / 2)) / a).sum()) / sqrt(
            2 * pi
        )

    c = bof4.BOF4_S.astype(float)
    edges = [-1, *(c[:-1] + c[1:]) / 2, 1]
    for k in (*range(7), *range(8, 15)):
        low, high = edges[k], edges[k + 1]
        mean = (moment(high) - moment(low)) / (mass(high) - mass(low))
        # Rounding moves each edge of an interval, and so its mean, by at most half a
        # float32 step below 1. The value itself moves by as much.
        assert abs(mean - c[k]) <= gamma(1), k
