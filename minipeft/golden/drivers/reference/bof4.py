"""BOF4-S in the NumPy column."""

import numpy as np

from minipeft.golden.tensors import Array
from minipeft.reference import blockwise, bof4
from minipeft.reference.blockwise import Blockwise


def bof4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """Return the packed codes and the scales."""
    q = bof4.quantize(W, blocksize)
    return q.packed, q.absmax


def bof4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    q = Blockwise(packed, absmax, bof4.BOF4_S, blocksize, shape)
    return blockwise.dequantize(q, dtype)
