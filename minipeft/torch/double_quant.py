"""Double quantization on any device: the same bytes as the reference."""

from dataclasses import dataclass
from math import fsum, prod

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.shapes import Float, Inexact, UInt8
from minipeft.torch import blockwise
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import NF4, dynamic_map_on


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
    r"""Quantize the weights, then their scales around the mean scale.

    $\bar a = \operatorname{mean}(a)$; $a - \bar a$ is quantized blockwise in turn.
    Scales are positive: without the mean, half of the signed codes would idle.

    Args:
        W: any shape; read row by row, so blocks run across rows. The last may be short.
        codebook: of the weights, as in `blockwise.quantize`.
        blocksize: weights that share a scale, a power of two.
        nested_blocksize: scales that share a nested scale, a power of two.

    Raises:
        InputError: at the first NaN or infinity; if a block size is no power of two.

    Source: QLoRA (arXiv:2305.14314), section 3, "Double Quantization".
    """
    blockwise.check_blocksize(nested_blocksize)
    q = blockwise.quantize(W, codebook, blocksize)
    offset = mean(q.absmax)
    signed = dynamic_map_on(W.device)
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
    r"""Give the scales their values back, then the weights.

    $\hat W_i = c_{q_i} \cdot \hat a$ with $\hat a = d_s \cdot a_2 + \bar a$, where $d$
    is the dynamic map, s the code of the scale and $a_2$ the nested scale. Product and
    sum are rounded to float32 one after the other.

    Args:
        q: what `quantize` returned.
        dtype: of the result.
    """
    return blockwise.dequantize(unnest(q), dtype)


def unnest(q: Nested) -> Blockwise:
    """Return the same codes with the decoded scales in float32.

    A scale far below the mean can come back as zero or a little below it.

    Raises:
        InputError: if there are codes or nested scales too few or too many.
    """
    blockwise.check_blocksize(q.blocksize)
    if q.offset.shape != ():
        raise InputError(
            f"offset has shape {tuple(q.offset.shape)}; give one number, their mean."
        )
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


def bits_per_parameter(q: Nested | Blockwise) -> float:
    r"""Return the stored bits over the number of weights, the offset included.

    $b + 8/B + 32/(B B_2) + 32/n$ where all blocks are full: 4.127 for NF4 with B = 64
    and B₂ = 256, of which the scales take 0.127. Plain blocks take $b + 32/B$ = 4.5.
    The codebooks are constants and not counted.

    Source: QLoRA (arXiv:2305.14314), section 3.
    """
    parts = [q.packed]
    if isinstance(q, Nested):
        parts += [q.absmax_codes, q.nested_absmax, q.offset]
    else:
        parts += [q.absmax]
    return 8 * sum(part.nbytes for part in parts) / prod(q.shape)


def mean(absmax: Float[Tensor, " blocks"]) -> Float[Tensor, ""]:
    """Return the mean of the scales; the same bits in every order of summation.

    The exact sum rounded to float64, divided there, rounded to float32.
    """
    # On the host: the order in which a device adds is not the same on any two.
    exact = fsum(absmax.tolist()) / max(len(absmax), 1)
    return torch.tensor(exact, dtype=torch.float32, device=absmax.device)
