"""NF4 and FP4 in the CuPy column."""

from dataclasses import replace

import numpy as np

from minipeft.cupy import blockwise
from minipeft.cupy.blockwise import Blockwise
from minipeft.cupy.codebook import FP4, NF4
from minipeft.cupy.executor import current
from minipeft.golden.tensors import Array

DEVICE = 0


def nf4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """Return the packed codes and the scales."""
    return _quantize(W, NF4, blocksize)


def fp4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """Return the packed codes and the scales."""
    return _quantize(W, FP4, blocksize)


def nf4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    return _dequantize(Blockwise(packed, absmax, NF4, blocksize, shape), dtype)


def fp4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    return _dequantize(Blockwise(packed, absmax, FP4, blocksize, shape), dtype)


def _quantize(W: Array, codebook: Array, blocksize: int) -> tuple[Array, Array]:
    gpu = current()
    q = blockwise.quantize(gpu.upload(W, DEVICE), codebook, blocksize)
    return gpu.download(q.packed), gpu.download(q.absmax)


def _dequantize(q: Blockwise, dtype: np.dtype[np.generic]) -> Array:
    gpu = current()
    packed, absmax, codebook = (
        gpu.upload(part, DEVICE) for part in (q.packed, q.absmax, q.codebook)
    )
    q = replace(q, packed=packed, absmax=absmax, codebook=codebook)
    return gpu.download(blockwise.dequantize(q, dtype))
