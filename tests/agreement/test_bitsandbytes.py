"""The bytes of bitsandbytes on the CPU, wherever bitsandbytes follows its own rules.

The tests use whole blocks only: bitsandbytes divides in a short last block, where it
multiplies whole blocks by a reciprocal. They use scales from 1e-38: bitsandbytes clamps
smaller scales, and the block is decoded too small. They use rows of whole blocks: on
processors with AVX-512 its dequantization reads wrong scales for any other shape of two
rows or more.
"""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minipeft.torch import blockwise
from minipeft.torch.codebook import FP4, NF4
from tests.strategies import seeds

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns about kernels that it did not find
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes import functional as theirs

CODEBOOKS = {"nf4": NF4, "fp4": FP4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_codebook = pytest.mark.parametrize("name", list(CODEBOOKS))
aligned = st.tuples(seeds, st.sampled_from([32, 64, 128]), st.integers(1, 5))


def quantized(W, name, blocksize):
    """Quantize with both; the packed bytes and the scales must be equal."""
    q = blockwise.quantize(W, CODEBOOKS[name], blocksize)
    packed, state = theirs.quantize_4bit(W, blocksize=blocksize, quant_type=name)
    assert torch.equal(q.packed, packed.view(-1))
    assert torch.equal(q.absmax, state.absmax)
    return q, packed, state


@each_codebook
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=aligned)
def test_both_directions(name, dtype, drawn):
    seed, blocksize, rows = drawn
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, 2 * blocksize, generator=generator)
    W[:, ::5] = 0
    W[0, :blocksize] = 0
    q, packed, state = quantized(W.to(dtype), name, blocksize)
    values = theirs.dequantize_4bit(packed, state)
    assert values.dtype == dtype
    assert torch.equal(values, blockwise.dequantize(q, dtype))


@each_codebook
@given(
    hnp.arrays(
        np.float32,
        64,
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
@example(np.linspace(-1, 1, 64, dtype=np.float32))
def test_any_whole_block(name, W):
    assume(not 0 < np.abs(W).max() < 1e-38)
    quantized(torch.from_numpy(W), name, 64)


@each_codebook
def test_ties(name):
    values = CODEBOOKS[name].sort().values
    midpoints = (values[:-1] + values[1:]) / 2
    one = torch.ones(64 - len(midpoints))  # an absmax of 1 leaves every value unchanged
    quantized(torch.cat([midpoints, one]), name, 64)


@each_codebook
@pytest.mark.parametrize("blocksize", [32, 64, 256, 1024, 4096])
def test_block_sizes(name, blocksize):
    W = torch.randn(2 * blocksize, generator=torch.Generator().manual_seed(0))
    quantized(W, name, blocksize)


def test_where_it_clamps_the_scale_we_keep_the_values():
    W = torch.full((64,), 1e-39)
    packed, state = theirs.quantize_4bit(W, blocksize=64, quant_type="nf4")
    assert not torch.equal(theirs.dequantize_4bit(packed, state), W)
    assert torch.equal(blockwise.dequantize(blockwise.quantize(W)), W)
