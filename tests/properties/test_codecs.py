"""The contract of every codec, in the reference."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from tests.codecs import CODECS, codebooks
from tests.strategies import blocksizes, seeds, weights
from tests.tolerance import assert_bits

each = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


@each
@given(W=weights(), values=codebooks, power=st.sampled_from([2.0**-20, 0.25, 2.0**10]))
def test_a_power_of_two_moves_only_the_scales(codec, W, values, power):
    q = codec.quantize(W, values)
    p = codec.quantize(W * np.float32(power), values)
    for name in codec.codes:
        assert_bits(getattr(p, name), getattr(q, name))
    for name in codec.scales:
        moved = getattr(q, name) * np.float32(power)
        assert_bits(np.asarray(getattr(p, name)), np.asarray(moved))


@each
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@given(W=weights(), values=codebooks, b=blocksizes)
def test_another_dtype_is_one_rounding_of_the_same(codec, dtype, W, values, b):
    q = codec.quantize(W, values, (b, 4))
    whole = codec.module.dequantize(q)
    assert (whole.dtype, whole.shape) == (np.float32, W.shape)
    with np.errstate(over="ignore"):  # beyond the largest float16, 65504
        assert_bits(codec.module.dequantize(q, dtype), whole.astype(dtype))


@each
@given(seed=seeds, b=st.sampled_from([8, 16, 64]))
def test_a_block_of_zeros_stays_zero(codec, seed, b):
    # A nested scale is rounded: the decoded scale may be slightly above or below zero.
    W = np.random.default_rng(seed).standard_normal((9, 64)).astype(np.float32)
    W[4] = 0
    q = codec.quantize(W, sizes=(b, 256))
    assert np.all(codec.module.dequantize(q)[4] == 0)


@each
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(codec, bad):
    W = np.ones((3, 5), np.float32)
    W[1, 2] = W[2, 4] = bad
    with pytest.raises(InputError, match=rf"{bad} at flat index 7, the first of 2"):
        codec.quantize(W)


@each
def test_a_part_of_another_size_is_refused(codec):
    for wrong, size in codec.spoilt():
        said = f"need {size}; pass the parts of one quantized tensor"
        with pytest.raises(InputError, match=said):
            codec.module.dequantize(wrong)
