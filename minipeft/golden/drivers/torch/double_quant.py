"""Double quantization in the torch column, of NF4."""

import numpy as np

from minipeft.golden.drivers.bridge import DEVICE, to_numpy, to_torch, torch_dtype
from minipeft.golden.tensors import Array
from minipeft.torch import double_quant
from minipeft.torch.codebook import NF4
from minipeft.torch.double_quant import Nested


def double_quant_quantize(
    W: Array, blocksize: int, nested_blocksize: int
) -> tuple[Array, ...]:
    """Return the packed codes, the codes of the scales, their scales, the offset."""
    q = double_quant.quantize(to_torch(W), NF4, blocksize, nested_blocksize)
    parts = (q.packed, q.absmax_codes, q.nested_absmax, q.offset)
    return tuple(to_numpy(part) for part in parts)


def double_quant_dequantize(
    packed: Array,
    absmax_codes: Array,
    nested_absmax: Array,
    offset: Array,
    blocksize: int,
    nested_blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    q = Nested(
        to_torch(packed),
        to_torch(absmax_codes),
        to_torch(nested_absmax),
        to_torch(np.asarray(offset)),
        NF4.to(DEVICE),
        blocksize,
        nested_blocksize,
        shape,
    )
    return to_numpy(double_quant.dequantize(q, torch_dtype(dtype)))
