"""Laws of blockwise quantization."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minipeft.errors import InputError
from minipeft.reference import blockwise, bof4
from minipeft.reference.codebook import FP4, NF2, NF3, NF4, dynamic_map
from tests.strategies import anything_finite, blocksizes, weights
from tests.tolerance import SMALLEST_SUBNORMAL, assert_bits, assert_within, gamma

CODEBOOKS = {"NF4": NF4, "FP4": FP4, "NF3": NF3, "NF2": NF2, "dynamic": dynamic_map()}
codebooks = st.sampled_from([NF4, FP4, NF3, NF2])


@given(anything_finite((70,)), codebooks, blocksizes)
def test_error_is_at_most_half_a_gap(W, codebook, blocksize):
    q = blockwise.quantize(W, codebook, blocksize)
    half_gap = np.diff(np.sort(codebook)).max() / 2
    absmax = np.repeat(q.absmax.astype(np.float64), blocksize)[: W.size]
    # Five roundings: reciprocal, product, midpoint (two), value times absmax.
    bound = absmax * (half_gap + gamma(5)) + SMALLEST_SUBNORMAL["float32"]
    assert_within(blockwise.dequantize(q), W, bound)


@given(weights(), codebooks, blocksizes)
def test_quantizing_again_changes_nothing(W, codebook, blocksize):
    q = blockwise.quantize(W, codebook, blocksize)
    again = blockwise.quantize(blockwise.dequantize(q), codebook, blocksize)
    assert_bits(again.absmax, q.absmax)
    assert_bits(blockwise.dequantize(again), blockwise.dequantize(q))
    if codebook is not FP4:  # a negative zero of FP4 is decoded as +0
        assert_bits(again.packed, q.packed)


@given(st.integers(1, 9), blocksizes.filter(lambda b: b >= 2), st.data())
def test_blocks_know_nothing_of_each_other(blocks, blocksize, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    W = rng.standard_normal((blocks, blocksize)).astype(np.float32)
    order = rng.permutation(blocks)
    q, shuffled = blockwise.quantize(W, NF4, blocksize), W[order]
    p = blockwise.quantize(shuffled, NF4, blocksize)
    assert_bits(p.absmax, q.absmax[order])
    assert_bits(p.packed, q.packed.reshape(blocks, -1)[order].reshape(-1))


@given(hnp.arrays(np.float32, 40, elements=st.integers(-999, 999).map(float)))
@example(np.arange(40, dtype=np.float32))
def test_a_power_of_two_moves_only_the_scales(W):
    # Powers of two down to 2**-149, where scales are subnormal: the codes stay the
    # same.
    q = blockwise.quantize(W, NF4, 8)
    for exponent in (-149, -140, -126, -120, 3, 100):
        p = blockwise.quantize(W * np.float32(2.0**exponent), NF4, 8)
        assert_bits(p.packed, q.packed)
        assert_bits(p.absmax, q.absmax * np.float32(2.0**exponent))


@given(hnp.arrays(np.float32, 64, elements=st.integers(-(2**20), 2**20).map(float)))
def test_the_code_is_the_nearest_one_over_the_rationals(W):
    assume(np.any(W))
    q = blockwise.quantize(W, NF4, 64)
    values = [Fraction(float(c)) for c in NF4]
    a = Fraction(float(q.absmax[0]))
    for w, code in zip(W, blockwise.unpack(q.packed, 4, 64), strict=True):
        distance = [abs(c - Fraction(float(w)) / a) for c in values]
        # The nearest value, or a value so close to a midpoint that float32 cannot
        # decide.
        assert distance[code] - min(distance) <= Fraction(gamma(5))


def test_a_tie_goes_to_the_lower_value():
    midpoints = (NF4[:-1] + NF4[1:]) / np.float32(2)
    W = np.append(midpoints, np.float32(1))  # absmax 1: no scaled value is rounded
    codes = blockwise.unpack(blockwise.quantize(W).packed, 4, 16)
    assert codes.tolist() == [*range(15), 15]
    above = np.nextafter(W, np.float32(2))[:15]
    W = np.append(above, np.float32(1))
    codes = blockwise.unpack(blockwise.quantize(W).packed, 4, 16)
    assert codes.tolist() == [*range(1, 16), 15]


@pytest.mark.parametrize(("name", "zero"), [("NF4", 7), ("FP4", 0), ("NF2", 1)])
def test_a_zero_block_holds_the_code_of_zero(name, zero):
    codebook = CODEBOOKS[name]
    q = blockwise.quantize(np.zeros(10, np.float32), codebook, 8)
    bits = blockwise.code_bits(codebook)
    assert blockwise.unpack(q.packed, bits, 10).tolist() == [zero] * 10
    assert_bits(q.absmax, np.zeros(2, np.float32))
    assert_bits(blockwise.dequantize(q), np.zeros(10, np.float32))


def test_the_end_of_the_last_byte_holds_the_code_of_zero():
    one = np.ones(1, np.float32)
    assert blockwise.quantize(one, NF4).packed.tolist() == [0xF7]
    assert blockwise.quantize(one, FP4).packed.tolist() == [0x30]
    assert blockwise.quantize(one, NF2).packed.tolist() == [0b11010101]


def test_fp4_keeps_its_second_zero_for_what_lies_above_zero():
    W = np.array([-1, -1e-4, 0, 1e-4], np.float32)
    codes = blockwise.unpack(blockwise.quantize(W, FP4).packed, 4, 4)
    assert codes.tolist() == [11, 0, 0, 8]


def test_the_first_code_is_in_the_high_bits():
    codes = np.array([1, 2], np.uint8)
    assert blockwise.pack(codes, 4).tolist() == [0x12]
    assert blockwise.pack(codes, 2).tolist() == [0b01100000]
    assert blockwise.pack(codes, 3).tolist() == [0b00101000]
    assert blockwise.pack(codes[:1], 4, fill=7).tolist() == [0x17]


@given(st.integers(1, 8), st.data())
def test_unpack_undoes_pack(bits, data):
    n = data.draw(st.integers(0, 50))
    elements = st.integers(0, 2**bits - 1)
    codes = data.draw(hnp.arrays(np.uint8, n, elements=elements))
    packed = blockwise.pack(codes, bits)
    assert packed.size == -(-n * bits // 8)
    assert_bits(blockwise.unpack(packed, bits, n), codes)


def test_float16_overflows_to_infinity_and_says_nothing():
    q = blockwise.quantize(np.array([1e5, 1.0], np.float32))
    assert blockwise.dequantize(q, np.float16)[0] == np.inf


def test_dequantize_refuses_a_block_size_that_quantize_refuses():
    q = blockwise.quantize(np.ones(8, np.float32), NF4, 8)
    with pytest.raises(InputError, match="blocksize is 0"):
        blockwise.dequantize(dataclasses.replace(q, blocksize=0))


def test_a_quantized_tensor_cannot_be_changed_by_name():
    q = blockwise.quantize(np.ones(4, np.float32))
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.blocksize = 32


@pytest.mark.parametrize("n", [0, 1, 7, 70])
def test_a_block_may_be_larger_than_the_tensor_and_takes_no_memory_for_it(n):
    W = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    for codec in (blockwise.quantize, bof4.quantize):
        q, one = codec(W, blocksize=2**31), codec(W, blocksize=128)
        assert_bits(q.packed, one.packed)
        assert_bits(q.absmax, one.absmax)
        assert_bits(blockwise.dequantize(q), blockwise.dequantize(one))
    for blocksize in (2**32, 2**40):
        with pytest.raises(
            InputError, match=r"choose a power of two from 1 to 2\*\*31"
        ):
            blockwise.quantize(W, blocksize=blocksize)
