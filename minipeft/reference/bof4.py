"""BOF4-S: the four-bit codebook of least squared error, scaled by the signed absmax."""

import numpy as np

from minipeft.reference.blockwise import (
    Blockwise,
    Values,
    check_blocksize,
    check_finite,
    nearest,
    pack,
    scale,
)
from minipeft.reference.codebook import Codebook
from minipeft.shapes import check_floats

# The least squared error for blocks of 64 normal values, with 0 and 1 held fixed. The
# paper finds its table from samples; this one is the same optimum by integration.
BOF4_S: Codebook = np.array(
    [
        -0.8568214120456706,
        -0.6691702077445002,
        -0.5234593517270274,
        -0.40044922648939535,
        -0.29103447414811434,
        -0.18999178977842218,
        -0.09385577033292299,
        0.0,
        0.08876418308451904,
        0.17945258817618787,
        0.27424847672892233,
        0.3759495017359126,
        0.48859093541612497,
        0.6187701107959525,
        0.7790818343061837,
        1.0,
    ],
    dtype=np.float32,
)


def quantize(W: Values, blocksize: int = 64) -> Blockwise:
    r"""Scale a block by its largest value, sign included, and round to the codebook.

    $c_i = \arg\min_k |q_k - W_i / a|$ with $a = W_m$, $m = \arg\max_j |W_j|$: the first
    of the largest. W_m itself is always the code of 1, so that no code is spent on -1.
    `blockwise.dequantize` decodes it; its `absmax` may be negative.

    Args:
        W: any shape; read row by row, so blocks run across rows. The last may be short.
        blocksize: values in a block, a power of two; the codebook is best for 64.

    Raises:
        InputError: at the first NaN or infinity; if W holds no floats or `blocksize` is
            no power of two.

    Source: BOF4 (arXiv:2505.06653), sections 3.1 and 3.2.
    """
    check_blocksize(blocksize)
    check_floats("W", W)
    flat = np.ascontiguousarray(W, dtype=np.float32).reshape(-1)
    check_finite(flat)
    width = min(blocksize, flat.size) or blocksize  # one block may be larger than W
    blocks = np.zeros((-(-flat.size // blocksize), width), np.float32)
    blocks.reshape(-1)[: flat.size] = flat
    largest = np.abs(blocks).argmax(axis=1, keepdims=True)
    signed = np.take_along_axis(blocks, largest, axis=1)[:, 0]
    codes = nearest(scale(blocks, signed), BOF4_S).reshape(-1)
    packed = pack(codes[: flat.size], 4, fill=7)
    return Blockwise(packed, signed, BOF4_S.copy(), blocksize, W.shape)
