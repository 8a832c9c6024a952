"""MXFP4 and NVFP4 on any device: the same bytes as the reference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.shapes import Float, Inexact, UInt8
from minipeft.torch.blockwise import check_dense, check_finite
from minipeft.torch.codebook import Codebook, table
from minipeft.torch.operands import check_float_dtype, check_tensor
from minipeft.values import check_kind

Weights = Inexact[Tensor, "... in_features"]
Blocks = Float[Tensor, "... blocks blocksize"]
Codes = UInt8[Tensor, "... bytes"]
Bytes = UInt8[Tensor, "... blocks"]

MX_BLOCKSIZE, NV_BLOCKSIZE = 32, 16
E2M1: Codebook = table([0, 0.5, 1, 1.5, 2, 3, 4, 6])


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
    tensor_scale: Float[Tensor, ""]


def quantize_mxfp4(W: Weights) -> MXFP4:
    """Scale 32 values by a power of two, round them to E2M1.

    Formula: `reference.microscaling.quantize_mxfp4`. The powers of two are `scales`
    viewed as `torch.float8_e8m0fnu`.

    Args:
        W: (…, in_features), a multiple of 32; the blocks lie within rows.

    Raises:
        InputError: at the first NaN or infinity, or if blocks do not fill the rows.
    """
    blocks = _blocks(W, MX_BLOCKSIZE)
    absmax = blocks.abs().amax(dim=-1)
    _, exponent = torch.frexp(absmax)
    biased = torch.where(absmax == 0, 0, (exponent - 1 - 2 + 127).clamp(min=0))
    scaled = torch.ldexp(blocks.double(), 127 - biased[..., None])
    return MXFP4(_pack(_e2m1(scaled.float())), biased.to(torch.uint8))


def dequantize_mxfp4(mx: MXFP4, dtype: torch.dtype = torch.float32) -> Weights:
    """Replace every code by its value: `reference.microscaling.dequantize_mxfp4`.

    Raises:
        InputError: if codes and scales do not belong together, or a scale is 255: NaN.
    """
    check_kind("mx", mx, MXFP4)
    _check_parts(mx.packed, mx.scales, MX_BLOCKSIZE)
    _check_scales(mx.scales, 255)
    exponents = mx.scales[..., None].int() - 127
    # In float64, which has all powers of two of float32 as normal numbers.
    blocks = torch.ldexp(_unpack(mx.packed, MX_BLOCKSIZE).double(), exponents)
    return _rows(blocks.float(), dtype)


def quantize_nvfp4(W: Weights) -> NVFP4:
    """Scale each 16 values by a number in E4M3, all by one number; round to E2M1.

    Formula: `reference.microscaling.quantize_nvfp4`. The numbers are `scales` viewed
    as `torch.float8_e4m3fn`.

    Args:
        W: (…, in_features), a multiple of 16; the blocks lie within rows.

    Raises:
        InputError: at the first NaN or infinity, or if blocks do not fill the rows.
    """
    blocks = _blocks(W, NV_BLOCKSIZE)
    absmax = blocks.abs().amax(dim=-1)
    largest = absmax.amax() if absmax.numel() else absmax.new_zeros(())
    tensor_scale = _divided(largest, torch.full_like(largest, 6 * 448))
    # Where the tensor scale is subnormal, rounding it may leave a quotient above 448,
    # which torch before 2.12 casts to NaN.
    exact = _divided(absmax, 6 * tensor_scale).clamp(max=448)
    scales = exact.to(torch.float8_e4m3fn)
    scaled = _divided(blocks, (scales.float() * tensor_scale)[..., None])
    return NVFP4(_pack(_e2m1(scaled)), scales.view(torch.uint8), tensor_scale)


def dequantize_nvfp4(nv: NVFP4, dtype: torch.dtype = torch.float32) -> Weights:
    """Replace every code by its value: `reference.microscaling.dequantize_nvfp4`.

    Raises:
        InputError: if codes and scales do not belong together, a scale is no positive
            number of E4M3, or `tensor_scale` is no number of at least 0.
    """
    check_kind("nv", nv, NVFP4)
    _check_parts(nv.packed, nv.scales, NV_BLOCKSIZE)
    _check_scales(nv.scales, 127)
    s = nv.tensor_scale
    check_tensor("tensor_scale", s)
    if s.shape != () or not 0 <= float(s) < float("inf"):
        raise InputError(f"tensor_scale is {s}; give one number of at least 0.")
    scales = nv.scales.view(torch.float8_e4m3fn).float() * s.float()
    return _rows(_unpack(nv.packed, NV_BLOCKSIZE) * scales[..., None], dtype)


def _e2m1(scaled: Blocks) -> UInt8[Tensor, "..."]:
    values = E2M1.to(scaled.device)
    middle = (values[:-1] + values[1:]) / 2
    below = torch.bucketize(scaled.abs(), middle)  # a tie takes the lower value
    tie = scaled.abs() == middle[below.clamp(max=6)]
    codes = below + (tie & (below % 2 == 1))
    return (codes + 8 * torch.signbit(scaled)).to(torch.uint8)


def _divided(x: Inexact[Tensor, "..."], by: Inexact[Tensor, "..."]) -> Tensor:
    # Zero keeps its sign where the scale is zero. Through float64, because GPU
    # compilers may approximate a float32 division.
    positive = by > 0
    divisor = torch.where(positive, by, torch.ones_like(by)).double()
    return (torch.where(positive, x, 0 * x).double() / divisor).float()


def _pack(codes: UInt8[Tensor, "... blocks blocksize"]) -> Codes:
    # The first of two codes is in the LOW four bits, as in files of these formats.
    flat = codes.flatten(-2)
    return flat[..., 0::2] | flat[..., 1::2] << 4


def _unpack(packed: Codes, blocksize: int) -> Blocks:
    codes = torch.stack([packed & 15, packed >> 4], dim=-1)
    values = torch.cat([E2M1, -E2M1]).to(packed.device)[codes.int()]
    blocks = 2 * packed.shape[-1] // blocksize
    return values.reshape(*packed.shape[:-1], blocks, blocksize)


def _rows(blocks: Blocks, dtype: torch.dtype) -> Weights:
    check_float_dtype(dtype)
    return blocks.flatten(-2).to(dtype)


def _blocks(W: Weights, blocksize: int) -> Blocks:
    check_dense(W)
    if not W.dim() or W.shape[-1] % blocksize:
        raise InputError(
            f"W has shape {tuple(W.shape)}; its rows must be whole blocks of "
            f"{blocksize}."
        )
    flat = W.detach().float().reshape(-1)
    check_finite(flat, flat)
    return flat.view(*W.shape[:-1], W.shape[-1] // blocksize, blocksize)


def _check_parts(packed: Codes, scales: Bytes, blocksize: int) -> None:
    for name, part in {"packed": packed, "scales": scales}.items():
        check_kind(name, part, Tensor)
        if part.dtype != torch.uint8 or not part.dim():
            raise InputError(
                f"{name} has dtype {part.dtype} and shape {tuple(part.shape)}; give "
                "rows of bytes (uint8)."
            )
    wanted = (*scales.shape[:-1], scales.shape[-1] * blocksize // 2)
    if packed.shape != wanted:
        raise InputError(
            f"packed has shape {tuple(packed.shape)}; scales of shape "
            f"{tuple(scales.shape)} belong to {wanted}."
        )


def _check_scales(scales: Bytes, largest: int) -> None:
    bad = torch.nonzero(scales.reshape(-1) >= largest)
    if len(bad):
        i = int(bad[0])
        raise InputError(
            f"scale {i} is the byte {int(scales.reshape(-1)[i])}; scales of this "
            f"format are 0 to {largest - 1}."
        )
