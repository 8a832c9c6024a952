"""Nested NF4 in bitsandbytes: `compress_statistics=True`."""

import numpy as np
import torch
from bitsandbytes import functional

from minipeft.golden.drivers.bridge import to_numpy, to_torch, torch_dtype
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array

OFFERED = "bitsandbytes offers blocks of 32 to 4096, nested in 256"


def double_quant_quantize(
    W: Array, blocksize: int, nested_blocksize: int
) -> tuple[Array, ...]:
    """Return codes, codes of scales, their scales, and the mean."""
    if blocksize < 32 or nested_blocksize != 256:
        raise Unsupported(OFFERED)
    packed, state = functional.quantize_4bit(
        to_torch(W), blocksize=blocksize, compress_statistics=True, quant_type="nf4"
    )
    nested = (state.absmax, state.state2.absmax, state.offset)
    return to_numpy(packed).reshape(-1), *map(to_numpy, nested)


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
    if blocksize < 32 or nested_blocksize != 256:
        raise Unsupported(OFFERED)
    code = functional.create_dynamic_map(signed=True)
    state = functional.QuantState(
        absmax=to_torch(absmax_codes),
        shape=torch.Size(shape),
        code=functional.get_4bit_type("nf4", device="cpu"),
        blocksize=blocksize,
        quant_type="nf4",
        dtype=torch_dtype(dtype),
        offset=torch.tensor(float(offset)),
        state2=functional.QuantState(
            absmax=to_torch(nested_absmax),
            code=code,
            blocksize=nested_blocksize,
            dtype=torch.float32,
        ),
    )
    W = functional.dequantize_4bit(to_torch(packed).reshape(-1, 1), state)
    return to_numpy(W.reshape(state.shape))
