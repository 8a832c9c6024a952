"""Details of blockwise quantization alone: ties, and codes packed into bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minipeft.reference import blockwise as reference
from minipeft.torch import blockwise
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
