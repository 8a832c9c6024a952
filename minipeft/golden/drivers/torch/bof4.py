"""BOF4-S in the torch column."""

import numpy as np

from minipeft.golden.drivers.bridge import DEVICE, to_numpy, to_torch, torch_dtype
from minipeft.golden.tensors import Array
from minipeft.torch import blockwise, bof4
from minipeft.torch.blockwise import Blockwise


def bof4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """Return the packed codes and the scales."""
    q = bof4.quantize(to_torch(W), blocksize)
    return to_numpy(q.packed), to_numpy(q.absmax)


def bof4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    codebook = bof4.BOF4_S.to(DEVICE)
    q = Blockwise(to_torch(packed), to_torch(absmax), codebook, blocksize, shape)
    return to_numpy(blockwise.dequantize(q, torch_dtype(dtype)))
