"""Double quantization: the scales of the blocks are quantized too, to eight bits."""

from dataclasses import dataclass, replace
from math import fsum, prod

import numpy as np
from numpy.typing import DTypeLike

from minipeft.errors import InputError
from minipeft.reference import blockwise
from minipeft.reference.blockwise import Blockwise, Bytes, Scales, Values
from minipeft.reference.codebook import NF4, Codebook, dynamic_map
from minipeft.shapes import Float, UInt8, check_shapes
from minipeft.values import check_kind, check_number, check_sizes


@dataclass(frozen=True)
class Nested:
    """A quantized tensor whose scales are codes of the signed dynamic map."""

    packed: Bytes
    absmax_codes: UInt8[np.ndarray, " blocks"]
    nested_absmax: Float[np.ndarray, " nested_blocks"]
    offset: np.float32
    codebook: Codebook
    blocksize: int
    nested_blocksize: int
    shape: tuple[int, ...]


def quantize(
    W: Values,
    codebook: Codebook = NF4,
    blocksize: int = 64,
    nested_blocksize: int = 256,
) -> Nested:
    r"""Quantize the weights, then their scales around the mean scale.

    $\bar a = \operatorname{mean}(a)$; the differences $a - \bar a$ are quantized
    blockwise. No scale is negative, so without subtracting the mean the negative
    codes would not be used.

    Args:
        W: any shape; read row by row, so blocks run across rows. The last may be short.
        codebook: of the weights, as in `blockwise.quantize`.
        blocksize: weights that share a scale, a power of two.
        nested_blocksize: scales that share a nested scale, a power of two.

    Raises:
        InputError: at the first NaN or infinity; if W holds no floats, a block size is
            no power of two, or the codebook no list of 2, 4, 8, 16 … 256 values.

    Source: QLoRA (arXiv:2305.14314), section 3, "Double Quantization".
    """
    blockwise.check_blocksize(nested_blocksize, "nested_blocksize")
    q = blockwise.quantize(W, codebook, blocksize)
    offset = mean(q.absmax)
    scales = blockwise.quantize(q.absmax - offset, dynamic_map(), nested_blocksize)
    return Nested(
        q.packed,
        scales.packed,  # 8-bit codes are bytes: no packing
        scales.absmax,
        offset,
        q.codebook,
        blocksize,
        nested_blocksize,
        W.shape,
    )


def dequantize(q: Nested, dtype: DTypeLike = np.float32) -> Values:
    r"""Decode the scales, then the weights.

    $\hat W_i = q_{c_i} \cdot \hat a$ with $\hat a = q'_{c'} \cdot a' + \bar a$, where
    $q'$ is the dynamic map, $c'$ the code of the scale and $a'$ the nested scale. The
    product is rounded to float32, then the sum.

    Args:
        q: what `quantize` returned.
        dtype: of the result; bfloat16 is `ml_dtypes.bfloat16`.

    Raises:
        InputError: if the number of codes or scales does not fit the shape, or `dtype`
            is no float dtype.
    """
    return blockwise.dequantize(unnest(q), dtype)


def unnest(q: Nested) -> Blockwise:
    """Return the same codes with the decoded scales in float32.

    A scale far below the mean can be decoded as zero or as a small negative number.

    Raises:
        InputError: if the number of codes or nested scales does not fit the shape.
    """
    check_kind("q", q, Nested)
    blockwise.check_blocksize(q.blocksize)
    check_sizes("shape", q.shape)
    check_number("offset", q.offset)
    scales = Blockwise(
        q.absmax_codes,
        q.nested_absmax,
        dynamic_map(),
        q.nested_blocksize,
        (-(-prod(q.shape) // q.blocksize),),
    )
    try:
        absmax = blockwise.dequantize(scales) + q.offset
    except InputError as error:
        raise InputError(f"the scales: {error}") from None
    whole = Blockwise(q.packed, absmax, q.codebook, q.blocksize, q.shape)
    blockwise.check_parts(whole)
    return replace(whole, packed=q.packed.copy(), codebook=q.codebook.copy())


def bits_per_parameter(q: Nested | Blockwise) -> float:
    r"""Return the stored bits over the number of weights, the offset included.

    $b + 8/B + 32/(B B_2) + 32/n$ where all blocks are full: 4.127 for NF4 with B = 64
    and B₂ = 256, of which the scales take 0.127. Plain blocks take $b + 32/B$ = 4.5.
    The codebooks are constants and not counted.

    Raises:
        InputError: if there is no weight, or another number of codes or scales.

    Source: QLoRA (arXiv:2305.14314), section 3.
    """
    check_kind("q", q, Nested, Blockwise)
    weights = blockwise.check_parts(unnest(q) if isinstance(q, Nested) else q)
    if not weights:
        raise InputError(f"q has shape {q.shape} and no weight; give at least one.")
    parts = [q.packed]
    if isinstance(q, Nested):
        parts += [q.absmax_codes, q.nested_absmax, np.asarray(q.offset)]
    else:
        parts += [q.absmax]
    return 8 * sum(part.nbytes for part in parts) / weights


def mean(absmax: Scales) -> np.float32:
    """Return the mean of the scales; the order of summation does not change its bits.

    The exact sum is rounded to float64, divided there, and rounded to float32. (A
    float32 sum depends on the order, and libraries differ in its last bit.)
    """
    check_shapes({"absmax": (absmax, "blocks")})
    return np.float32(fsum(absmax) / max(absmax.size, 1))
