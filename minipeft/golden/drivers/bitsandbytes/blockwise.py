"""NF4 and FP4 in bitsandbytes: `functional.quantize_4bit` and `dequantize_4bit`."""

import numpy as np
import torch
from bitsandbytes import functional

from minipeft.golden.drivers.bridge import to_numpy, to_torch, torch_dtype
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array


def nf4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """Return the packed codes and the scales."""
    return _quantize(W, "nf4", blocksize)


def fp4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """Return the packed codes and the scales."""
    return _quantize(W, "fp4", blocksize)


def nf4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    state = _state("nf4", absmax, blocksize, shape, torch_dtype(dtype))
    return _dequantize(packed, state)


def fp4_dequantize(
    packed: Array,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
) -> Array:
    """Return the weight."""
    state = _state("fp4", absmax, blocksize, shape, torch_dtype(dtype))
    return _dequantize(packed, state)


def _quantize(W: Array, quant_type: str, blocksize: int) -> tuple[Array, Array]:
    _check_offered(blocksize)
    packed, state = functional.quantize_4bit(
        to_torch(W), blocksize=blocksize, quant_type=quant_type
    )
    # One byte in a row in its layout, a plain vector in the vectors'.
    return to_numpy(packed).reshape(-1), to_numpy(state.absmax)


def _state(
    quant_type: str,
    absmax: Array,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> functional.QuantState:
    _check_offered(blocksize)
    return functional.QuantState(
        absmax=to_torch(absmax),
        shape=torch.Size(shape),
        code=functional.get_4bit_type(quant_type, device="cpu"),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
    )


def _dequantize(packed: Array, state: functional.QuantState) -> Array:
    W = functional.dequantize_4bit(to_torch(packed).reshape(-1, 1), state)
    return to_numpy(W.reshape(state.shape))  # its vectors come back as one row


def _check_offered(blocksize: int) -> None:
    if blocksize in (1, 2, 4, 8, 16):
        raise Unsupported("bitsandbytes offers blocks of 32 to 4096")
