"""MXFP4 and NVFP4: 4-bit floats in short blocks, each with a scale of one byte."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from minipeft.errors import InputError
from minipeft.reference.blockwise import check_finite
from minipeft.shapes import Float, UInt8, check_array, check_dtype, check_floats
from minipeft.values import check_kind

Weights = Float[np.ndarray, "... in_features"]
Blocks = Float[np.ndarray, "... blocks blocksize"]
Scales = Float[np.ndarray, "... blocks"]
Codes = UInt8[np.ndarray, "... bytes"]
Bytes = UInt8[np.ndarray, "... blocks"]

MX_BLOCKSIZE, NV_BLOCKSIZE = 32, 16

# The values from zero upwards, in the order of their codes. E2M1 has two bits of
# exponent and one of mantissa, E4M3 four and three; 127 of E4M3 is NaN.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_STEPS, _EXPONENTS = np.arange(8), np.arange(1, 16)[:, None]
E4M3 = np.concatenate(
    [np.ldexp(_STEPS, -9), np.ldexp(8 + _STEPS, _EXPONENTS - 10).ravel()[:-1]]
).astype(np.float32)
_SIGN = np.uint8(8)


@dataclass(frozen=True)
class MXFP4:
    """The codes of a weight, and one power of two for each 32 values of a row."""

    packed: Codes
    scales: Bytes


@dataclass(frozen=True)
class NVFP4:
    """The codes of a weight, a scale in E4M3 per 16 values, and one scale for all."""

    packed: Codes
    scales: Bytes
    tensor_scale: Float[np.ndarray, ""]


def quantize_mxfp4(W: Weights) -> MXFP4:
    r"""Scale 32 values by a power of two, round them to E2M1.

    $X = 2^{\lfloor \log_2 \max_j |W_j| \rfloor - 2}$, $c_i = \mathrm{E2M1}(W_i / X)$:
    ties go to the even code, and values above 6 become 6. X is stored as its exponent
    plus 127; a block of zeros gets the smallest, 0.

    Args:
        W: (…, in_features), a multiple of 32; the blocks lie within rows.

    Raises:
        InputError: at the first NaN or infinity, or if blocks do not fill the rows.

    Source: OCP Microscaling Formats (MX) 1.0, sections 5 and 6.3.
    """
    blocks = _blocks(W, MX_BLOCKSIZE)
    _, exponent = np.frexp(np.abs(blocks).max(axis=-1))  # 1/2 <= fraction < 1
    zero = ~blocks.any(axis=-1)
    biased = np.where(zero, 0, np.maximum(exponent - 1 - 2 + 127, 0))
    scaled = np.ldexp(blocks, 127 - biased[..., None])
    return MXFP4(_pack(_e2m1(scaled)), biased.astype(np.uint8))


def dequantize_mxfp4(mx: MXFP4, dtype: DTypeLike = np.float32) -> Weights:
    r"""Replace every code by its value: $\hat W_i = \mathrm{E2M1}_{c_i} \cdot X$.

    Args:
        mx: what `quantize_mxfp4` returned.
        dtype: of the result; the float32 product is rounded to it.

    Raises:
        InputError: if codes and scales do not belong together, or a scale is 255: NaN.
    """
    check_kind("mx", mx, MXFP4)
    check_dtype(dtype)
    _check_parts(mx.packed, mx.scales, MX_BLOCKSIZE)
    _check_scales(mx.scales, 255)
    blocks = _unpack(mx.packed, MX_BLOCKSIZE)
    exponents = mx.scales[..., None].astype(np.int32) - 127
    with np.errstate(over="ignore"):  # 4 * 2**126 is beyond float32: inf
        values = np.ldexp(blocks, exponents)
    return _rows(values, dtype)


def quantize_nvfp4(W: Weights) -> NVFP4:
    r"""Scale each 16 values by a number in E4M3, all by one number; round to E2M1.

    $s = \max |W| / (6 \cdot 448)$, $e = \mathrm{E4M3}(\max_j |W_j| / (6 s))$ in each
    block, $c_i = \mathrm{E2M1}(W_i / (e s))$. Products and quotients are rounded to
    float32; ties go to the even code; where $e s$ is zero, so are the codes.

    Args:
        W: (…, in_features), a multiple of 16; the blocks lie within rows.

    Raises:
        InputError: at the first NaN or infinity, or if blocks do not fill the rows.

    Source: NVIDIA, "Introducing NVFP4" (2025); the order of the operations is ours.
    """
    blocks = _blocks(W, NV_BLOCKSIZE)
    absmax = np.abs(blocks).max(axis=-1)
    tensor_scale = absmax.max(initial=0) / np.float32(6 * 448)
    scales = _nearest_even(_divided(absmax, 6 * tensor_scale), E4M3)
    scaled = _divided(blocks, (E4M3[scales] * tensor_scale)[..., None])
    return NVFP4(_pack(_e2m1(scaled)), scales, np.asarray(tensor_scale))


def dequantize_nvfp4(nv: NVFP4, dtype: DTypeLike = np.float32) -> Weights:
    r"""Replace every code by its value: $\hat W_i = \mathrm{E2M1}_{c_i} (e s)$.

    Args:
        nv: what `quantize_nvfp4` returned.
        dtype: of the result; the float32 products are rounded to it.

    Raises:
        InputError: if codes and scales do not belong together, a scale is no positive
            number of E4M3, or `tensor_scale` is no number of at least 0.
    """
    check_kind("nv", nv, NVFP4)
    check_dtype(dtype)
    _check_parts(nv.packed, nv.scales, NV_BLOCKSIZE)
    _check_scales(nv.scales, 127)
    check_floats("tensor_scale", nv.tensor_scale)
    s = nv.tensor_scale
    if s.shape != () or not 0 <= s < np.inf:
        raise InputError(f"tensor_scale is {s}; give one number of at least 0.")
    scales = E4M3[nv.scales] * s.astype(np.float32)
    return _rows(_unpack(nv.packed, NV_BLOCKSIZE) * scales[..., None], dtype)


def _e2m1(scaled: Blocks) -> UInt8[np.ndarray, "..."]:
    sign = np.where(np.signbit(scaled), _SIGN, np.uint8(0))
    return _nearest_even(np.abs(scaled), E2M1) | sign


def _nearest_even(
    x: Float[np.ndarray, "..."], values: Float[np.ndarray, " codes"]
) -> UInt8[np.ndarray, "..."]:
    """Return the code of the nearest value; a tie goes to the even code."""
    middle = (values[:-1] + values[1:]) / 2
    below = np.searchsorted(middle, x, side="left")  # a tie takes the lower value
    tie = x == middle[np.minimum(below, len(middle) - 1)]
    return (below + (tie & (below % 2 == 1))).astype(np.uint8)


def _divided(
    x: Float[np.ndarray, "..."], by: Float[np.ndarray, "..."] | np.float32
) -> Float[np.ndarray, "..."]:
    # Zero keeps its sign where the scale is zero.
    return np.where(by > 0, x, 0 * x) / np.where(by > 0, by, np.float32(1))


def _pack(codes: UInt8[np.ndarray, "... blocks blocksize"]) -> Codes:
    # The first of two codes is in the LOW four bits, as in files of these formats.
    pairs = codes.reshape(*codes.shape[:-2], codes.shape[-2] * codes.shape[-1] // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << np.uint8(4)


def _unpack(packed: Codes, blocksize: int) -> Blocks:
    codes = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    values = np.concatenate([E2M1, -E2M1])[codes]
    blocks = 2 * packed.shape[-1] // blocksize
    return values.reshape(*packed.shape[:-1], blocks, blocksize)


def _rows(blocks: Blocks, dtype: DTypeLike) -> Weights:
    lead, (count, size) = blocks.shape[:-2], blocks.shape[-2:]
    with np.errstate(over="ignore"):  # from 65520 on float16 is inf
        return blocks.reshape(*lead, count * size).astype(dtype)


def _blocks(W: Weights, blocksize: int) -> Blocks:
    check_floats("W", W)
    if not W.ndim or W.shape[-1] % blocksize:
        raise InputError(
            f"W has shape {W.shape}; its rows must be whole blocks of {blocksize}."
        )
    with np.errstate(over="ignore"):  # 1e300 is a number in float64 alone
        single = W.astype(np.float32)
    check_finite(single.reshape(-1))
    count = W.shape[-1] // blocksize
    return single.reshape(*W.shape[:-1], count, blocksize)


def _check_parts(packed: Codes, scales: Bytes, blocksize: int) -> None:
    for name, part in {"packed": packed, "scales": scales}.items():
        check_array(name, part, "bytes")
        if part.dtype != np.uint8 or not part.ndim:
            raise InputError(
                f"{name} has dtype {part.dtype} and shape {part.shape}; give rows of "
                "bytes (uint8)."
            )
    wanted = (*scales.shape[:-1], scales.shape[-1] * blocksize // 2)
    if packed.shape != wanted:
        raise InputError(
            f"packed has shape {packed.shape}; scales of shape {scales.shape} belong "
            f"to {wanted}."
        )


def _check_scales(scales: Bytes, largest: int) -> None:
    bad = np.flatnonzero(scales >= largest)
    if bad.size:
        raise InputError(
            f"scale {bad[0]} is the byte {scales.flat[bad[0]]}; scales of this format "
            f"are 0 to {largest - 1}."
        )
