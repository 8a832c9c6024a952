"""Details of double quantization alone: the scales, and bitsandbytes' decoding."""

from dataclasses import replace

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
from tests.agreement.on_torch import codes
from tests.strategies import blocksizes, seeds, weights
from tests.tolerance import assert_bits, assert_within, gamma


@given(weights(), blocksizes)
def test_the_scales_agree_in_every_byte(W, b):
    q = reference.quantize(W, codebook.NF4, b, 16)
    ours, theirs = double_quant.unnest(codes(q)), reference.unnest(q)
    assert_bits(ours.absmax.numpy(), theirs.absmax)
    assert double_quant.bits_per_parameter(codes(q)) == reference.bits_per_parameter(q)


@given(st.integers(1, 300), seeds)
def test_the_offset_agrees_for_scales_of_any_range(n, seed):
    absmax = np.exp2(np.random.default_rng(seed).uniform(-60, 60, n)).astype(np.float32)
    actual = double_quant.mean(torch.from_numpy(absmax)).numpy()
    assert_bits(actual, np.asarray(reference.mean(absmax)))


def test_scales_are_not_decoded_beside_a_codebook_that_has_no_codes():
    q = double_quant.quantize(torch.ones(64))
    with pytest.raises(InputError, match="the codebook has 15 values"):
        double_quant.unnest(replace(q, codebook=q.codebook[:15]))


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
    # The mean of bitsandbytes is a float32 sum in another order; its last bit may
    # differ.
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
