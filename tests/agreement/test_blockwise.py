"""Details of blockwise quantization alone: ties, and codes packed into bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minipeft.errors import InputError
from minipeft.reference import blockwise as reference
from minipeft.reference import bof4 as reference_bof4
from minipeft.torch import blockwise, bof4
from minipeft.torch.qlora import QuantizedLinear
from tests.agreement.test_codecs import assert_agree
from tests.codecs import CODEBOOKS, CODECS
from tests.tolerance import assert_bits


@pytest.mark.parametrize("name", ["NF4", "FP4", "NF3", "NF2"])
def test_ties_and_their_neighbours(name):
    values = CODEBOOKS[name]
    ordered = np.sort(values)
    midpoints = (ordered[:-1] + ordered[1:]) / np.float32(2)
    below, above = (np.nextafter(midpoints, np.float32(end)) for end in (-2, 2))
    # An absmax of 1 leaves every value unchanged.
    W = np.concatenate([below, midpoints, above, np.ones(1, np.float32)])
    for codec in CODECS:
        assert_agree(codec, W, values, (64, 4))


@given(st.integers(1, 8), st.data())
def test_packing(bits, data):
    n, fill = data.draw(st.integers(0, 50)), data.draw(st.integers(0, 2**bits - 1))
    codes = data.draw(hnp.arrays(np.uint8, n, elements=st.integers(0, 2**bits - 1)))
    expected = reference.pack(codes, bits, fill)
    packed = blockwise.pack(torch.from_numpy(codes), bits, fill)
    assert_bits(packed.numpy(), expected)
    assert_bits(blockwise.unpack(packed, bits, n).numpy(), codes)


@pytest.mark.parametrize("n", [0, 1, 7, 65, 70])
def test_a_block_larger_than_the_tensor_takes_no_memory_for_it(n):
    W = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    for ours, theirs in ((blockwise, reference), (bof4, reference_bof4)):
        q = ours.quantize(torch.tensor(W), blocksize=2**31)
        expected = theirs.quantize(W, blocksize=2**31)
        assert_bits(q.packed.numpy(), expected.packed)
        assert_bits(q.absmax.numpy(), expected.absmax)
        assert_bits(blockwise.dequantize(q).numpy(), reference.dequantize(expected))


def test_a_blocksize_beyond_every_index_is_refused_before_memory_is_asked_for():
    layer = torch.nn.Linear(6, 5)
    for act in (
        lambda: blockwise.quantize(layer.weight, blocksize=2**40),
        lambda: QuantizedLinear.from_linear(layer, blocksize=2**32),
        lambda: QuantizedLinear.from_linear(layer, nested_blocksize=2**40),
    ):
        with pytest.raises(
            InputError, match=r"choose a power of two from 1 to 2\*\*31"
        ):
            act()
