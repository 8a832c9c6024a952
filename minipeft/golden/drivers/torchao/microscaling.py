"""MXFP4 and NVFP4 in torchao's MX formats."""

import numpy as np
import torch
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import (
    nvfp4_quantize as quantize,
)
from torchao.prototype.mx_formats.nvfp4_tensor import (
    per_tensor_amax_to_scale,
)

from minipeft.golden.drivers.bridge import to_numpy, to_torch, torch_dtype
from minipeft.golden.tensors import Array

FP4 = torch.float4_e2m1fn_x2


def mxfp4_quantize(W: Array) -> tuple[Array, Array]:
    """Return the packed codes and the exponents."""
    scales, packed = to_mx(to_torch(W), FP4, 32)
    return _bytes(packed), _bytes(scales)


def mxfp4_dequantize(
    packed: Array, scales: Array, dtype: np.dtype[np.generic]
) -> Array:
    """Return the weight."""
    powers = to_torch(scales).view(torch.float8_e8m0fnu)
    return to_numpy(to_dtype(to_torch(packed), powers, FP4, 32, torch_dtype(dtype)))


def nvfp4_quantize(W: Array) -> tuple[Array, Array, Array]:
    """Return the packed codes, the scales of the blocks, and theirs."""
    tensor_scale = per_tensor_amax_to_scale(to_torch(W).abs().max())
    rows = to_torch(W).reshape(-1, W.shape[-1])  # it takes two axes
    scales, packed = quantize(rows, 16, tensor_scale)
    lead = W.shape[:-1]
    return (
        _bytes(packed).reshape(*lead, -1),
        _bytes(scales).reshape(*lead, -1),
        to_numpy(tensor_scale),
    )


def _bytes(tensor: torch.Tensor) -> Array:
    return to_numpy(tensor.view(torch.uint8))
