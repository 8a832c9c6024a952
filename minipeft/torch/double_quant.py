"""Double quantization on any device: the same bytes as the reference."""

from dataclasses import dataclass
from math import fsum, prod

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.shapes import Float, Inexact, UInt8
from minipeft.torch import blockwise
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import NF4, code_bits, dynamic_map_on
from minipeft.torch.operands import check_bytes, check_tensor, check_tensors
from minipeft.values import check_kind, check_sizes


@dataclass(frozen=True)
class Nested:
    """A quantized tensor whose scales are codes of the signed dynamic map."""

    packed: UInt8[Tensor, " bytes"]
    absmax_codes: UInt8[Tensor, " blocks"]
    nested_absmax: Float[Tensor, " nested_blocks"]
    offset: Float[Tensor, ""]
    codebook: Float[Tensor, " codes"]
    blocksize: int
    nested_blocksize: int
    shape: tuple[int, ...]


def quantize(
    W: Inexact[Tensor, "..."],
    codebook: Float[Tensor, " codes"] = NF4,
    blocksize: int = 64,
    nested_blocksize: int = 256,
) -> Nested:
    """Quantize the weights, then their scales around the mean scale.

    Formula and arguments: `reference.double_quant.quantize`.

    Raises:
        InputError: at the first NaN or infinity; if a block size is no power of two.

    Source: QLoRA (arXiv:2305.14314), section 3, "Double Quantization".
    """
    blockwise.check_blocksize(nested_blocksize)
    return nest(blockwise.quantize(W, codebook, blocksize), nested_blocksize)


def nest(q: Blockwise, nested_blocksize: int = 256) -> Nested:
    """Return the same codes with their scales quantized; one look at the device.

    Raises:
        InputError: if the block size is no power of two.
    """
    blockwise.check_parts(q)
    blockwise.check_blocksize(nested_blocksize)
    offset = mean(q.absmax)
    signed = dynamic_map_on(q.absmax.device)
    scales = blockwise.quantize(q.absmax - offset, signed, nested_blocksize)
    return Nested(
        q.packed,
        scales.packed,  # a code of eight bits is a byte
        scales.absmax,
        offset,
        q.codebook,
        q.blocksize,
        nested_blocksize,
        q.shape,
    )


def dequantize(q: Nested, dtype: torch.dtype = torch.float32) -> Inexact[Tensor, "..."]:
    """Decode the scales, then the weights, as `reference.double_quant.dequantize` does.

    Args:
        q: what `quantize` returned.
        dtype: of the result.
    """
    return blockwise.dequantize(unnest(q), dtype)


def unnest(q: Nested) -> Blockwise:
    """Return the same codes with the decoded scales in float32.

    Raises:
        InputError: if the number of codes or of nested scales does not fit the shape.
    """
    check_kind("q", q, Nested)
    blockwise.check_blocksize(q.blocksize)
    check_sizes("shape", q.shape)
    check_bytes("packed", q.packed)
    code_bits(q.codebook)
    _check_offset(q.offset)
    scales = Blockwise(
        q.absmax_codes,
        q.nested_absmax,
        dynamic_map_on(q.packed.device),
        q.nested_blocksize,
        (-(-prod(q.shape) // q.blocksize),),
    )
    try:
        absmax = blockwise.dequantize(scales) + q.offset
    except InputError as error:
        raise InputError(f"the scales: {error}") from None
    return Blockwise(q.packed, absmax, q.codebook, q.blocksize, q.shape)


def check_stored(q: Nested | Blockwise) -> None:
    """Refuse parts that are not those of one quantized tensor.

    Raises:
        InputError: names the part, and what it is.
    """
    check_kind("q", q, Nested, Blockwise)
    blockwise.check_parts(unnest(q) if isinstance(q, Nested) else q)


def bits_per_parameter(q: Nested | Blockwise) -> float:
    """Return the stored bits per weight, as the reference counts them."""
    check_stored(q)
    if not prod(q.shape):
        raise InputError(f"q has shape {q.shape} and no weight; give at least one.")
    parts = [q.packed]
    if isinstance(q, Nested):
        parts += [q.absmax_codes, q.nested_absmax, q.offset]
    else:
        parts += [q.absmax]
    return 8 * sum(part.nbytes for part in parts) / prod(q.shape)


def mean(absmax: Float[Tensor, " blocks"]) -> Float[Tensor, ""]:
    """Return the mean of the scales; the order of summation does not change its bits.

    Formula: `reference.double_quant.mean`.
    """
    check_tensors({"absmax": (absmax, "blocks")})
    # On the host: two kinds of device add in two different orders.
    exact = fsum(absmax.tolist()) / max(len(absmax), 1)
    return torch.tensor(exact, dtype=torch.float32, device=absmax.device)


def _check_offset(offset: Float[Tensor, ""]) -> None:
    check_tensor("offset", offset)
    if offset.shape != ():
        raise InputError(
            f"offset has shape {tuple(offset.shape)}; give one number, their mean."
        )
