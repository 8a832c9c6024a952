"""Laws of QLoRA: a 4-bit base, gradients of A and B alone, three ways to merge."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from minipeft.reference import blockwise, double_quant, lora, qlora
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import FP4, NF2, NF4
from minipeft.reference.double_quant import Nested
from tests.parametrizations import quantized
from tests.strategies import gaussian_layers, seeds
from tests.tolerance import assert_bits, assert_within, gamma

nested = st.booleans()


def adapter(t):
    return lora.LoRA(t.A, t.B, t.scaling)


@given(gaussian_layers, nested)
def test_it_is_lora_on_the_dequantized_weight(t, double):
    q = quantized(t.W, double)
    W = qlora.dequantize(q)
    actual = qlora.forward(t.x, q, adapter(t), t.bias)
    assert_bits(actual, lora.forward(t.x, W, adapter(t), t.bias))
    gradients = qlora.backward(t.grad_y, t.x, q, adapter(t))
    expected = lora.backward(t.grad_y, t.x, W, adapter(t))
    assert gradients._fields == ("x", "A", "B")  # and no gradient of the base
    for mine, same in zip(gradients, expected, strict=True):
        assert_bits(mine, same)


@given(gaussian_layers, nested, st.sampled_from([np.float16, bfloat16]))
def test_in_sixteen_bits_weight_and_bias_are_rounded_to_them(t, double, dtype):
    q, codec = quantized(t.W, double), double_quant if double else blockwise
    W, x, grad_y = (a.astype(dtype) for a in (codec.dequantize(q), t.x, t.grad_y))
    bias = None if t.bias is None else t.bias.astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # float16 ends at 65504
        y = qlora.forward(x, q, adapter(t), t.bias)
        assert_bits(y, lora.forward(x, W, adapter(t), bias).astype(dtype))
        gradients = qlora.backward(grad_y, x, q, adapter(t))
        expected = lora.backward(grad_y, x, W, adapter(t))
        assert_bits(gradients.x, expected.x.astype(dtype))
    assert_bits(gradients.A, expected.A)
    assert_bits(gradients.B, expected.B)


def sixteen_bits(columns, name):
    """Return the relative error that 16 bits may cost a layer of so many columns."""
    # x and W are rounded; their product is rounded after a sum of one term a column;
    # the result is rounded. The roundings of float32 add up to less than one more.
    return gamma(2 + columns + 1 + 1, name)


@given(seeds, nested, st.sampled_from([np.float16, bfloat16]))
def test_sixteen_bits_cost_what_their_roundings_allow(seed, double, dtype):
    rng = np.random.default_rng(seed)
    x, W, A, B = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((3, 12), (7, 12), (2, 12), (7, 2))
    )
    q, update = quantized(W, double), lora.LoRA(A, B, 2.0)
    actual = qlora.forward(x.astype(dtype), q, update)
    exact = qlora.forward(x.astype(np.float64), q, lora.LoRA(A, B, 2.0))
    absolute = lora.LoRA(abs(A), abs(B), 2.0)
    size = lora.forward(abs(x), abs(qlora.dequantize(q)), absolute)
    name = np.dtype(dtype).name
    bound = sixteen_bits(W.shape[1], name) * size.astype(np.float64)
    tiny = 50 * 2.0**-24 if dtype is np.float16 else 0  # subnormal float16
    assert_within(actual, exact, bound + tiny)


@given(gaussian_layers, nested)
def test_requantized_is_the_dequantized_merge_in_four_bits(t, double):
    q = quantized(t.W, double)
    again = qlora.requantize(q, adapter(t))
    expected = quantized(qlora.merge(q, adapter(t)), double)
    assert type(again) is type(q) is (Nested if double else Blockwise)
    assert_bits(again.packed, expected.packed)
    assert_bits(qlora.dequantize(again), qlora.dequantize(expected))


@given(gaussian_layers, st.sampled_from([FP4, NF2]), st.sampled_from([2, 8]))
def test_requantizing_keeps_the_format(t, codebook, blocksize):
    plain = blockwise.quantize(t.W, codebook, blocksize)
    double = double_quant.quantize(t.W, codebook, blocksize, 4)
    for q in (plain, double):
        again = qlora.requantize(q, adapter(t))
        assert_bits(again.codebook, codebook)
        assert (again.blocksize, again.shape) == (blocksize, t.W.shape)
    assert again.nested_blocksize == 4
    expected = double_quant.quantize(qlora.merge(q, adapter(t)), codebook, blocksize, 4)
    assert_bits(again.packed, expected.packed)
    assert_bits(again.nested_absmax, expected.nested_absmax)


@given(seeds, st.sampled_from([16, 64]), st.integers(1, 3))
def test_a_small_update_vanishes_when_requantized(seed, blocksize, r):
    # The update is less than half the smallest gap of the codebook everywhere, and zero
    # at the largest value of each block: no code changes, and the training is lost.
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((8, 2 * blocksize)).astype(np.float32)
    q = blockwise.quantize(W, NF4, blocksize)
    W = qlora.dequantize(q)
    scales = q.absmax.reshape(8, 2)
    A = rng.uniform(-1, 1, (r, W.shape[1])).astype(np.float32)
    A[:, (np.abs(W) == np.repeat(scales, blocksize, axis=1)).any(axis=0)] = 0
    half_gap = np.diff(NF4).min() / 2 * (1 - gamma(9))
    B = np.full((8, r), scales.min(axis=1, keepdims=True) * half_gap / r)
    update = lora.LoRA(A, B.astype(np.float32), 0.99)
    assert np.any(qlora.merge(q, update) != W) == np.any(A)
    assert_bits(qlora.requantize(q, update).packed, q.packed)


@given(seeds)
def test_requantizing_without_an_update_changes_plain_blocks_not_at_all(seed):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((6, 64)).astype(np.float32)
    nothing = lora.LoRA(np.ones((2, 64), np.float32), np.zeros((6, 2), np.float32), 2.0)
    for double in (False, True):
        q = quantized(W, double)
        again = qlora.requantize(q, nothing)
        assert_bits(again.packed, q.packed)
        if not double:  # nested scales are rounded around a new mean
            assert_bits(again.absmax, q.absmax)
