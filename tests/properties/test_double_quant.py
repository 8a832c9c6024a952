"""Laws of double quantization."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.reference import blockwise, double_quant
from minipeft.reference.codebook import FP4, NF2, NF4, dynamic_map
from tests.strategies import blocksizes, seeds, weights
from tests.tolerance import assert_bits, assert_within, gamma

codebooks = st.sampled_from([NF4, FP4, NF2])


@given(weights(), codebooks, blocksizes, blocksizes)
def test_the_codes_of_the_weights_are_those_of_plain_blocks(W, codebook, b, b2):
    plain = blockwise.quantize(W, codebook, b)
    q = double_quant.quantize(W, codebook, b, b2)
    assert_bits(q.packed, plain.packed)
    assert q.absmax_codes.shape == plain.absmax.shape
    assert q.nested_absmax.shape == (-(-plain.absmax.size // b2),)


@given(weights(), blocksizes, blocksizes)
def test_a_scale_comes_back_within_half_a_gap(W, b, b2):
    exact = blockwise.quantize(W, NF4, b).absmax
    q = double_quant.quantize(W, NF4, b, b2)
    half_gap = np.diff(dynamic_map()).max() / 2
    nested = np.repeat(q.nested_absmax.astype(np.float64), b2)[: exact.size]
    # Subtracting the offset, reciprocal, product, midpoint (two), code times nested
    # scale, adding the offset: every term is at most offset + nested.
    bound = nested * half_gap + (nested + q.offset) * gamma(7)
    # The map goes from -0.993 to +1, so the lowest scale may be below the first code.
    bound += nested * (1 + dynamic_map()[0])
    assert_within(double_quant.unnest(q).absmax, exact, bound)


@given(weights(), blocksizes)
def test_decoding_is_two_roundings_and_no_more(W, b):
    q = double_quant.quantize(W, NF4, b, 4)
    for i, code in enumerate(q.absmax_codes):
        value = Fraction(float(dynamic_map()[code]))
        product = np.float32(value * Fraction(float(q.nested_absmax[i // 4])))
        total = Fraction(float(product)) + Fraction(float(q.offset))
        assert_bits(double_quant.unnest(q).absmax[i], np.float32(total))


@given(st.integers(1, 40), seeds)
def test_equal_scales_come_back_exactly(blocks, seed):
    rng = np.random.default_rng(seed)
    W = rng.uniform(-1, 1, (blocks, 8)).astype(np.float32)
    W[:, 3] = -1.25  # all blocks have the same absmax, so every difference is zero
    q = double_quant.quantize(W, NF4, 8)
    assert np.all(q.absmax_codes == 127)
    assert_bits(double_quant.dequantize(q), blockwise.dequantize(plain(W, 8)))


@given(st.integers(1, 300), seeds)
def test_the_offset_does_not_know_the_order_of_the_scales(n, seed):
    rng = np.random.default_rng(seed)
    absmax = np.exp2(rng.uniform(-60, 60, n)).astype(np.float32)
    shuffled = rng.permutation(absmax)
    assert_bits(double_quant.mean(shuffled), double_quant.mean(absmax))
    exact = sum(Fraction(float(a)) for a in absmax) / n
    # The sum and the division round to float64, the result is rounded to float32.
    bound = Fraction(gamma(1)) + 3 * Fraction(gamma(1, "float64"))
    assert abs(Fraction(float(double_quant.mean(absmax))) - exact) <= bound * exact


@given(seeds)
def test_the_offset_of_ordinary_scales_is_their_float64_mean(seed):
    # The scales lie within a factor of 2**11, so float64 adds up to 2**18 of them
    # exactly.
    absmax = np.random.default_rng(seed).uniform(1, 9, 2**12).astype(np.float32)
    assert_bits(double_quant.mean(absmax), np.float32(absmax.astype(float).mean()))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # 4 bits; a scale 8/64; a nested scale 32/(64 * 256); the offset 32/n
        ((128, 128), Fraction(4) + Fraction(8, 64) + Fraction(64, 128 * 128)),
        ((4096, 256), Fraction(4126953125, 10**9) + Fraction(32, 2**20)),
        # one short block: 5 bytes of codes, one scale, one nested scale, the offset
        ((9,), Fraction(8 * 5 + 8 + 32 + 32, 9)),
    ],
)
def test_the_bits_of_a_parameter_are_those_stored(shape, expected):
    q = double_quant.quantize(np.ones(shape, np.float32))
    assert double_quant.bits_per_parameter(q) == float(expected)


def test_half_a_bit_becomes_an_eighth_and_a_little():
    W = np.ones((512, 512), np.float32)
    before = double_quant.bits_per_parameter(blockwise.quantize(W)) - 4
    after = double_quant.bits_per_parameter(double_quant.quantize(W)) - 4
    assert before == 0.5
    assert after - 32 / W.size == 0.126953125


def test_every_code_can_be_reached_and_zero_is_one_of_them():
    # bitsandbytes on a CPU replaces the search by a table of 65,536 bins: it never
    # gives the codes 124 to 130, and an exact zero gets code 131, which is 2.1e-5 of
    # the absmax.
    q = blockwise.quantize(dynamic_map(), dynamic_map(), 256)
    assert q.packed.tolist() == list(range(256))
    assert dynamic_map()[127] == 0
    q = blockwise.quantize(np.array([0, 3], np.float32), dynamic_map(), 256)
    assert q.packed.tolist() == [127, 255]


def test_both_halves_of_the_map_are_in_order():
    # A wrong indentation once left a gap from 0.36 to 0.41 (bitsandbytes issue 227).
    values = dynamic_map()
    assert np.diff(values).max() <= 0.9 / 64 + gamma(3)
    assert_bits(values[1:127], -values[128:254][::-1])


def plain(W, blocksize):
    return blockwise.quantize(W, NF4, blocksize)
