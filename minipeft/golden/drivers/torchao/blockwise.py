"""NF4 in torchao: there is no FP4 of this kind."""

from math import prod

import numpy as np
import torch
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import (
    NF4Tensor,
    SubclassTensorArgs,
    get_block_absmax,
)

from minipeft.golden.drivers.bridge import to_numpy, to_torch, torch_dtype
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array


def nf4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """Return the packed codes and the scales."""
    _check_offered(W.size, blocksize)
    flat = to_torch(W).reshape(-1)
    table = _table(flat.dtype)
    absmax = get_block_absmax(flat, blocksize)  # torchao's own check of the block
    packed = NF4Tensor.convert_to_norm_float_weight(flat, len(absmax), blocksize, table)
    return to_numpy(packed), to_numpy(absmax.float())


def nf4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    _check_offered(prod(shape), blocksize)
    like = torch.empty(shape, dtype=torch_dtype(dtype))
    # Its second level is bypassed: scales in blocks of one, times 1, plus a mean of 0.
    q = NF4Tensor(
        SubclassTensorArgs(
            like.size(), like.stride(), 0, like.dtype, like.device, False
        ),
        blocksize,
        n_blocks=len(absmax),
        scaler_block_size=1,
        quantized_scalers=to_torch(absmax),
        quantization_factor=torch.ones(len(absmax)),
        scaler_mean=torch.zeros((), dtype=like.dtype),
        quantized_data=to_torch(packed),
        nf4=_table(like.dtype),
    )
    return to_numpy(q.get_original_weight())


def _table(dtype: torch.dtype) -> torch.Tensor:
    """Return the table that torchao itself uses for weights of this dtype."""
    table: torch.Tensor = NF4Tensor.from_tensor(torch.ones(2, dtype=dtype), 2, 1).nf4
    return table


def _check_offered(size: int, blocksize: int) -> None:
    if blocksize == 1 or (blocksize > 0 and size % blocksize):
        raise Unsupported("torchao takes whole blocks of an even size only")
