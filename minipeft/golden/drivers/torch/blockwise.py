"""NF4 and FP4 in the torch column."""

import numpy as np

from minipeft.golden.drivers.bridge import DEVICE, to_numpy, to_torch, torch_dtype
from minipeft.golden.tensors import Array
from minipeft.torch import blockwise
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import FP4, NF4, Codebook


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
    q = Blockwise(to_torch(packed), to_torch(absmax), NF4.to(DEVICE), blocksize, shape)
    return to_numpy(blockwise.dequantize(q, torch_dtype(dtype)))


def fp4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    q = Blockwise(to_torch(packed), to_torch(absmax), FP4.to(DEVICE), blocksize, shape)
    return to_numpy(blockwise.dequantize(q, torch_dtype(dtype)))


def _quantize(W: Array, codebook: Codebook, blocksize: int) -> tuple[Array, Array]:
    q = blockwise.quantize(to_torch(W), codebook, blocksize)
    return to_numpy(q.packed), to_numpy(q.absmax)
