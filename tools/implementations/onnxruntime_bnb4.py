"""4-bit quantization in onnxruntime. Packages: onnxruntime==1.32.0."""

import numpy as np
from onnxruntime.capi import _pybind_state as native

from minipeft.golden.tensors import Array

FP4, NF4 = 0, 1


def nf4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """What `MatMulBnb4Quantizer` calls, for NF4."""
    return _quantize(W, blocksize, NF4)


def fp4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """The same for FP4."""
    return _quantize(W, blocksize, FP4)


def _quantize(W: Array, blocksize: int, kind: int) -> tuple[Array, Array]:
    if W.dtype.name not in ("float32", "float16") or W.ndim > 2 or not W.size:
        raise NotImplementedError("matrices of float32 or float16 alone")
    given = np.atleast_2d(W)
    packed = np.zeros((W.size + 1) // 2, np.uint8)
    absmax = np.zeros(-(-W.size // blocksize), W.dtype)
    native.quantize_matmul_bnb4(packed, given, absmax, blocksize, kind, *given.shape)
    return packed, absmax.astype(np.float32)
