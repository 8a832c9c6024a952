"""NF4 and FP4 in the NumPy column."""

import numpy as np

from minipeft.golden.tensors import Array
from minipeft.reference import blockwise
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import FP4, NF4


def nf4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """Return the packed codes and the scales."""
    q = blockwise.quantize(W, NF4, blocksize)
    return q.packed, q.absmax


def fp4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """Return the packed codes and the scales."""
    q = blockwise.quantize(W, FP4, blocksize)
    return q.packed, q.absmax


def nf4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    return blockwise.dequantize(Blockwise(packed, absmax, NF4, blocksize, shape), dtype)


def fp4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    return blockwise.dequantize(Blockwise(packed, absmax, FP4, blocksize, shape), dtype)
