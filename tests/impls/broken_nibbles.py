"""A foreign module that packs the first code into the low bits and has no LoRA."""

import numpy as np

from minipeft.golden.drivers.reference import blockwise as right


def nf4_quantize(W: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    packed, absmax = right.nf4_quantize(W, blocksize)
    return packed >> 4 | packed << 4, absmax


nf4_dequantize = right.nf4_dequantize
