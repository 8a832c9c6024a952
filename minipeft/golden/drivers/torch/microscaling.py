"""MXFP4 and NVFP4 in the torch column."""

import numpy as np

from minipeft.golden.drivers.bridge import to_numpy, to_torch, torch_dtype
from minipeft.golden.tensors import Array
from minipeft.torch import microscaling
from minipeft.torch.microscaling import MXFP4, NVFP4


def mxfp4_quantize(W: Array) -> tuple[Array, Array]:
    """Return the packed codes and the exponents."""
    q = microscaling.quantize_mxfp4(to_torch(W))
    return to_numpy(q.packed), to_numpy(q.scales)


def mxfp4_dequantize(
    packed: Array, scales: Array, dtype: np.dtype[np.generic]
) -> Array:
    """Return the weight."""
    q = MXFP4(to_torch(packed), to_torch(scales))
    return to_numpy(microscaling.dequantize_mxfp4(q, torch_dtype(dtype)))


def nvfp4_quantize(W: Array) -> tuple[Array, Array, Array]:
    """Return the packed codes, the scales of the blocks, and theirs."""
    q = microscaling.quantize_nvfp4(to_torch(W))
    return to_numpy(q.packed), to_numpy(q.scales), to_numpy(q.tensor_scale)


def nvfp4_dequantize(
    packed: Array, scales: Array, tensor_scale: Array, dtype: np.dtype[np.generic]
) -> Array:
    """Return the weight."""
    q = NVFP4(to_torch(packed), to_torch(scales), to_torch(tensor_scale))
    return to_numpy(microscaling.dequantize_nvfp4(q, torch_dtype(dtype)))
