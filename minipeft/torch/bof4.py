"""BOF4-S on any device: the same bytes as the reference."""

import torch
from torch import Tensor

from minipeft.shapes import Inexact
from minipeft.torch.blockwise import (
    Blockwise,
    check_blocksize,
    check_dense,
    check_finite,
    nearest,
    pack,
    scale,
    width_of,
)
from minipeft.torch.codebook import Codebook, table

# The least squared error for blocks of 64 normal values, with 0 and 1 held fixed. The
# paper finds its table from samples; this one is the same optimum by integration.
BOF4_S: Codebook = table(
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
    ]
)


def quantize(W: Inexact[Tensor, "..."], blocksize: int = 64) -> Blockwise:
    """Scale a block by its largest value, sign included, and round to the codebook.

    The formula is that of the reference. `blockwise.dequantize` decodes it.

    Args:
        W: any shape; read row by row, so blocks run across rows. The last may be short.
        blocksize: values in a block, a power of two.

    Raises:
        InputError: at the first NaN or infinity; if W holds no floats or `blocksize` is
            no power of two.
    """
    check_dense(W)
    check_blocksize(blocksize)
    flat, n = W.detach().reshape(-1), W.numel()
    width = width_of(blocksize, n)
    filled = torch.nn.functional.pad(flat.float(), (0, -n % width))
    blocks = filled.view(-1, width)
    largest = blocks.abs().argmax(dim=1, keepdim=True)  # the first, if there are two
    signed = blocks.gather(1, largest)[:, 0]
    check_finite(flat, signed)
    codebook = BOF4_S.to(W.device)
    codes = nearest(scale(blocks, signed), codebook).view(-1)[:n]
    packed = pack(codes, 4, fill=7)
    return Blockwise(packed, signed, codebook, blocksize, tuple(W.shape))
