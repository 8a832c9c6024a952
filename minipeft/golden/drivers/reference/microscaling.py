"""MXFP4 and NVFP4 in the NumPy column."""

import numpy as np

from minipeft.golden.tensors import Array
from minipeft.reference import microscaling
from minipeft.reference.microscaling import MXFP4, NVFP4


def mxfp4_quantize(W: Array) -> tuple[Array, Array]:
    """Return the packed codes and the exponents."""
    q = microscaling.quantize_mxfp4(W)
    return q.packed, q.scales


def mxfp4_dequantize(
    packed: Array, scales: Array, dtype: np.dtype[np.generic]
) -> Array:
    """Return the weight."""
    return microscaling.dequantize_mxfp4(MXFP4(packed, scales), dtype)


def nvfp4_quantize(W: Array) -> tuple[Array, Array, Array]:
    """Return the packed codes, the scales of the blocks, and theirs."""
    q = microscaling.quantize_nvfp4(W)
    return q.packed, q.scales, q.tensor_scale


def nvfp4_dequantize(
    packed: Array, scales: Array, tensor_scale: Array, dtype: np.dtype[np.generic]
) -> Array:
    """Return the weight."""
    return microscaling.dequantize_nvfp4(NVFP4(packed, scales, tensor_scale), dtype)
