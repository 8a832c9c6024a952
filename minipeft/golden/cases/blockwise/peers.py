"""What bitsandbytes' CUDA kernel answers where it differs for a reason."""

import numpy as np

from minipeft.golden.tensors import Array
from minipeft.reference import blockwise
from minipeft.reference.codebook import FP4

# Thresholds of the kernel between the magnitudes of FP4, ascending, and their codes.
_FP4_THRESHOLDS = np.array(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333],
    dtype=np.float32,
)
_FP4_CODES = np.array([0, 1, 6, 7, 4, 5, 2, 3], dtype=np.uint8)


def cuda_packed(W: Array, codebook: Array, blocksize: int) -> Array:
    """Quantize by the kernel's rules: 0/0 is code 0, FP4 by sign and magnitude."""
    flat = W.astype(np.float32).reshape(-1)
    blocks = np.zeros((-(-flat.size // blocksize), blocksize), np.float32)
    blocks.reshape(-1)[: flat.size] = flat
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.float32(1) / np.abs(blocks).max(axis=1, keepdims=True)
        scaled = blocks * inverse
    codes = _fp4(scaled) if codebook is FP4 else blockwise.nearest(scaled, codebook)
    codes = np.where(np.isnan(scaled), np.uint8(0), codes).reshape(-1)
    whole_bytes = flat.size + flat.size % 2  # the spare code is that of a padding 0
    return blockwise.pack(codes[:whole_bytes], 4)


def _fp4(scaled: Array) -> Array:
    above = np.abs(scaled)[..., None] > _FP4_THRESHOLDS
    sign = np.where(scaled < 0, np.uint8(8), np.uint8(0))
    return _FP4_CODES[above.sum(axis=-1)] + sign
