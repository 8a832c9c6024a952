"""Double quantization in the CuPy column, of NF4."""

import numpy as np

from minipeft.cupy import double_quant
from minipeft.cupy.codebook import NF4
from minipeft.cupy.double_quant import Nested
from minipeft.cupy.executor import current
from minipeft.golden.tensors import Array

DEVICE = 0


def double_quant_quantize(
    W: Array, blocksize: int, nested_blocksize: int
) -> tuple[Array, ...]:
    """Return the packed codes, the codes of the scales, their scales, the offset."""
    gpu = current()
    there = gpu.upload(W, DEVICE)
    q = double_quant.quantize(there, NF4, blocksize, nested_blocksize)
    parts = (q.packed, q.absmax_codes, q.nested_absmax)
    return tuple(map(gpu.download, (*parts, q.offset)))


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
    gpu = current()
    parts = (packed, absmax_codes, nested_absmax, np.asarray(offset, np.float32), NF4)
    codes, scales, nested, mean, codebook = (gpu.upload(p, DEVICE) for p in parts)
    sizes = (blocksize, nested_blocksize, shape)
    q = Nested(codes, scales, nested, mean, codebook, *sizes)
    return gpu.download(double_quant.dequantize(q, dtype))
