"""A codebook is sixteen numbers, each given by a formula."""

import numpy as np
import pytest

from minipeft.reference.codebook import FP4, NF2, NF3, NF4, dynamic_map, normal_float
from tests.tolerance import UNIT_ROUNDOFF, assert_bits, assert_within


def test_nf4_is_its_formula_up_to_the_published_rounding():
    # The table holds quantiles of float32 points: they differ by a few last bits of 1.
    assert_within(normal_float(4), NF4, 4 * UNIT_ROUNDOFF["float32"])


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_has_one_more_positive_value_than_negative(bits):
    values = normal_float(bits)
    assert values.dtype == np.float32
    assert np.all(np.diff(values) > 0)
    assert (values[0], values[-1]) == (-1, 1)
    assert np.sum(values < 0) == 2 ** (bits - 1) - 1
    assert np.sum(values == 0) == 1
    assert np.sum(values > 0) == 2 ** (bits - 1)


def test_smaller_codebooks_are_normal_floats():
    assert_bits(NF3, normal_float(3))
    assert_bits(NF2, normal_float(2))


def test_fp4_is_sign_two_exponent_bits_and_one_mantissa_bit():
    for code, value in enumerate(FP4 * 12):
        sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
        # Bit pattern 000 is zero, 001 the one subnormal number. The exponents are
        # stored so that 01 stands for 8, 10 for 4 and 11 for 2.
        size = (0, 0.0625)[mantissa] if not exponent else 0
        size = size or {0: 0, 1: 8, 2: 4, 3: 2}[exponent] * (1 + mantissa / 2)
        assert abs(value) == np.float32(size)
        assert value <= 0 if sign else value >= 0


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_256_ascending_values(signed):
    values = dynamic_map(signed)
    assert values.shape == (256,)
    assert np.all(np.diff(values) > 0)
    assert values[-1] == 1
    assert np.sum(values == 0) == 1


def test_signed_dynamic_map_is_asymmetric_by_one_value():
    values = dynamic_map(signed=True)
    assert_bits(values[values < 0], -values[(values > 0) & (values < 1)][::-1])
    assert values[0] == np.float32(-0.99296874)
    assert np.sum(values < 0) == 127


def test_unsigned_dynamic_map_starts_at_zero():
    values = dynamic_map(signed=False)
    assert values[0] == 0
    assert values[-2] == np.float32(0.9964844)
