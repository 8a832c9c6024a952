"""Both columns nest the scales to the same bytes, and give the same bytes back."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import blockwise as reference_blockwise
from minipeft.reference import codebook
from minipeft.reference import double_quant as reference
from minipeft.torch import blockwise, double_quant
from tests.strategies import blocksizes, seeds, weights
from tests.tolerance import assert_bits, assert_within, gamma

codebooks = st.sampled_from([codebook.NF4, codebook.FP4, codebook.NF2])
PARTS = ("packed", "absmax_codes", "nested_absmax", "offset")


def bits(tensor):
    """A tensor's values as NumPy has them, bfloat16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def on_torch(q):
    """The reference's result as the torch column's."""
    parts = [torch.from_numpy(np.array(getattr(q, part))) for part in PARTS]
    values = torch.from_numpy(q.codebook.copy())
    return double_quant.Nested(*parts, values, q.blocksize, q.nested_blocksize, q.shape)


@given(weights(), codebooks, blocksizes, blocksizes)
def test_quantize_agrees_in_every_byte(W, values, b, b2):
    q = double_quant.quantize(torch.from_numpy(W), torch.from_numpy(values), b, b2)
    expected = reference.quantize(W, values, b, b2)
    for part in PARTS:
        assert_bits(getattr(q, part).numpy(), np.asarray(getattr(expected, part)))
    assert double_quant.bits_per_parameter(q) == reference.bits_per_parameter(expected)


@given(weights(), codebooks, blocksizes, st.sampled_from(["float32", "bfloat16"]))
def test_dequantize_agrees_in_every_byte(W, values, b, name):
    q = reference.quantize(W, values, b, 16)
    actual = double_quant.dequantize(on_torch(q), getattr(torch, name))
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.float32
    assert_bits(bits(actual), reference.dequantize(q, dtype))
    absmax = double_quant.unnest(on_torch(q)).absmax
    assert_bits(absmax.numpy(), reference.unnest(q).absmax)


@given(st.integers(1, 300), seeds)
def test_the_offset_agrees_for_scales_of_any_range(n, seed):
    absmax = np.exp2(np.random.default_rng(seed).uniform(-60, 60, n)).astype(np.float32)
    actual = double_quant.mean(torch.from_numpy(absmax)).numpy()
    assert_bits(actual, np.asarray(reference.mean(absmax)))


def test_plain_blocks_take_the_same_bits_in_both_columns():
    W = np.ones((96, 64), np.float32)
    ours = double_quant.bits_per_parameter(blockwise.quantize(torch.from_numpy(W)))
    plain = reference_blockwise.quantize(W)
    assert ours == reference.bits_per_parameter(plain) == 4.5


@pytest.mark.parametrize("seed", range(4))
def test_bitsandbytes_decodes_our_bytes_as_we_do(seed):
    F = pytest.importorskip("bitsandbytes").functional
    W = np.random.default_rng(seed).standard_normal((96, 128)).astype(np.float32)
    packed, state = F.quantize_4bit(
        torch.from_numpy(W), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    q = reference.quantize(W)
    assert_bits(packed.numpy().reshape(-1), q.packed)
    # Its mean is a float32 sum in an order of its own: the last bit may not be ours.
    blocks = q.absmax_codes.size
    assert_within(float(state.offset), q.offset, gamma(blocks + 1) * q.offset)
    theirs = double_quant.Nested(
        packed.view(-1),
        state.absmax,
        state.state2.absmax,
        state.offset,
        blockwise.NF4,
        64,
        256,
        W.shape,
    )
    decoded = F.dequantize_4bit(packed, state)
    assert_bits(decoded.numpy(), double_quant.dequantize(theirs).numpy())


@pytest.mark.parametrize("sizes", [(64, 3), (0, 256)])
def test_a_block_size_that_is_no_power_of_two_is_refused(sizes):
    with pytest.raises(InputError, match="positive power of two"):
        double_quant.quantize(torch.ones(4), blockwise.NF4, *sizes)


def test_a_value_that_is_not_finite_is_named():
    with pytest.raises(InputError, match="nan at flat index 1"):
        double_quant.quantize(torch.tensor([1.0, torch.nan]))
