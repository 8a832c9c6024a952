"""Double quantization in the NumPy column, of NF4."""

import numpy as np

from minipeft.golden.tensors import Array
from minipeft.reference import double_quant
from minipeft.reference.codebook import NF4
from minipeft.reference.double_quant import Nested


def double_quant_quantize(
    W: Array, blocksize: int, nested_blocksize: int
) -> tuple[Array, ...]:
    """Return the packed codes, the codes of the scales, their scales, the offset."""
    q = double_quant.quantize(W, NF4, blocksize, nested_blocksize)
    return q.packed, q.absmax_codes, q.nested_absmax, np.asarray(q.offset)


def double_quant_dequantize(
    packed: Array,
    absmax_codes: Array,
    nested_absmax: Array,
    offset: Array,
    blocksize: int,
    nested_blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    parts = (packed, absmax_codes, nested_absmax, np.float32(offset))
    q = Nested(*parts, NF4, blocksize, nested_blocksize, shape)
    return double_quant.dequantize(q, dtype)
