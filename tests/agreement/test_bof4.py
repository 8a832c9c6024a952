"""BOF4-S: the torch column writes the bytes of the reference."""

import torch
from hypothesis import given

from minipeft.reference import blockwise as reference_blockwise
from minipeft.reference import bof4 as reference
from minipeft.torch import blockwise, bof4
from tests.strategies import blocksizes, weights
from tests.tolerance import assert_bits


@given(weights(), blocksizes)
def test_the_columns_agree_in_every_byte(W, b):
    ours, theirs = bof4.quantize(torch.from_numpy(W), b), reference.quantize(W, b)
    assert_bits(ours.packed.numpy(), theirs.packed)
    assert_bits(ours.absmax.numpy(), theirs.absmax)
    decoded = blockwise.dequantize(ours).numpy()
    assert_bits(decoded, reference_blockwise.dequantize(theirs))


def test_the_tables_are_one():
    assert_bits(bof4.BOF4_S.numpy(), reference.BOF4_S)
