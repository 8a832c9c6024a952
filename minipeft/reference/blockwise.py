"""Blockwise quantization: scale a block by its absmax, round to a codebook."""

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import DTypeLike

from minipeft.errors import InputError
from minipeft.reference.codebook import NF4, Codebook, code_bits
from minipeft.shapes import (
    Float,
    UInt8,
    check_array,
    check_dtype,
    check_floats,
    check_shapes,
)
from minipeft.values import check_integer, check_kind, check_sizes

Bytes = UInt8[np.ndarray, " bytes"]
Codes = UInt8[np.ndarray, " n"]
Scales = Float[np.ndarray, " blocks"]
Blocks = Float[np.ndarray, "blocks blocksize"]
Values = Float[np.ndarray, "..."]


@dataclass(frozen=True)
class Blockwise:
    """A quantized tensor: codes, and one scale for each block of consecutive values."""

    packed: Bytes
    absmax: Scales
    codebook: Codebook
    blocksize: int
    shape: tuple[int, ...]


def quantize(W: Values, codebook: Codebook = NF4, blocksize: int = 64) -> Blockwise:
    r"""Round every value to the nearest code of its scaled block.

    $c_i = \arg\min_k |q_k - W_i / a|$ with $a = \max_{j \in \text{block}} |W_j|$.

    Args:
        W: any shape; read row by row, so blocks run across rows. The last may be short.
        codebook: 2, 4, 8, 16 … 256 values in [-1, 1] in the order of their codes.
        blocksize: values in a block, a power of two.

    Raises:
        InputError: at the first NaN or infinity; if W holds no floats, `blocksize` is
            no power of two, or the codebook no list of 2, 4, 8, 16 … 256 values.

    Source: QLoRA (arXiv:2305.14314), sections 2 and 3.
    """
    check_blocksize(blocksize)
    check_floats("W", W)
    bits = code_bits(codebook)
    flat = np.ascontiguousarray(W, dtype=np.float32).reshape(-1)
    check_finite(flat)
    width = min(blocksize, flat.size)  # a block may be larger than W
    blocks = np.zeros((-(-flat.size // blocksize), width), np.float32)
    blocks.reshape(-1)[: flat.size] = flat
    absmax = np.abs(blocks).max(axis=1, initial=0)
    codes = nearest(scale(blocks, absmax), codebook).reshape(-1)
    (zero,) = nearest(np.zeros(1, np.float32), codebook)
    packed = pack(codes[: flat.size], bits, fill=int(zero))
    return Blockwise(packed, absmax, codebook.copy(), blocksize, W.shape)


def dequantize(q: Blockwise, dtype: DTypeLike = np.float32) -> Values:
    r"""Replace every code by its value: $\hat W_i = q_{c_i} \cdot a$.

    Args:
        q: what `quantize` returned.
        dtype: of the result, such as `ml_dtypes.bfloat16`; the float32 product is
            rounded to it.

    Raises:
        InputError: if the number of codes or scales does not fit the shape, or `dtype`
            is no float dtype.
    """
    check_dtype(dtype)
    size = check_parts(q)
    codes = unpack(q.packed, code_bits(q.codebook), size)
    absmax = np.repeat(q.absmax.astype(np.float32), min(q.blocksize, size))[:size]
    with np.errstate(over="ignore"):  # from 65520 on float16 is inf
        return (q.codebook[codes] * absmax).astype(dtype).reshape(q.shape)


def nearest(scaled: Values, codebook: Codebook) -> UInt8[np.ndarray, "..."]:
    """Return the code of the nearest value; a tie takes the lower value.

    The boundaries are the float32 midpoints of neighbouring values. If two codes have
    equal values (FP4 has two zeros), numbers above the value get the second code.

    Raises:
        InputError: if the codebook is not one axis of 2, 4, 8, 16 … 256 finite floats.
    """
    code_bits(codebook)
    check_floats("the scaled weight", scaled)
    order = np.argsort(codebook, kind="stable")
    values = codebook[order]
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    return order[np.searchsorted(midpoints, scaled, side="left")].astype(np.uint8)


def scale(blocks: Blocks, absmax: Scales) -> Blocks:
    """Multiply each block by the reciprocal of its scale; leave a block of scale 0.

    Args:
        blocks: finite values.
        absmax: one scale a block, of either sign.

    Raises:
        InputError: if there are scales too few or too many.
    """
    check_shapes({"blocks": (blocks, "blocks n"), "absmax": (absmax, "blocks")})
    # The reciprocal of a subnormal may overflow; to multiply both by 2**64 is exact.
    lift = np.where(np.abs(absmax) < 2.0**-126, np.float32(2**64), np.float32(1))
    inverse = np.float32(1) / np.where(absmax == 0, np.float32(1), absmax * lift)
    return (blocks * lift[:, None]) * inverse[:, None]


def pack(codes: Codes, bits: int, fill: int = 0) -> Bytes:
    """Write codes of `bits` bits one after another, the first in the HIGH bits.

    Args:
        codes: each below `2**bits`.
        bits: 1 to 8.
        fill: the code for the unused end of the last byte.

    Raises:
        InputError: if a number is out of range.
    """
    _check_bits(bits)
    _check_bytes("codes", codes)
    check_integer("fill", fill, 0, 2**bits - 1)
    if (largest := codes.max(initial=0)) >= 2**bits:
        raise InputError(f"a code is {largest}; {bits} bits hold 0 to {2**bits - 1}.")
    spare = -codes.size % 8  # eight codes always fill whole bytes
    padded = np.concatenate([codes, np.full(spare, fill, np.uint8)])
    bit_rows = np.unpackbits(padded[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(bit_rows)[: -(-codes.size * bits // 8)]


def unpack(packed: Bytes, bits: int, n: int) -> Codes:
    """Return the first `n` codes that `pack` wrote.

    Raises:
        InputError: if there are fewer than n, or `bits` is out of range.
    """
    _check_bits(bits)
    _check_bytes("packed", packed)
    check_integer("n", n)
    if not 0 <= n * bits <= 8 * packed.size:
        raise InputError(
            f"n is {n}; {packed.size} bytes hold {8 * packed.size // bits}."
        )
    bit_rows = np.unpackbits(packed)[: n * bits].reshape(n, bits)
    return np.packbits(bit_rows, axis=1, bitorder="big")[:, 0] >> np.uint8(8 - bits)


def check_blocksize(blocksize: int, name: str = "blocksize") -> None:
    """Refuse a block size that is no power of two from 1 to 2**31."""
    check_integer(name, blocksize)
    if not 1 <= blocksize <= 2**31 or blocksize & (blocksize - 1):
        raise InputError(
            f"{name} is {blocksize}; choose a power of two from 1 to 2**31, such as 64."
        )


def check_parts(q: Blockwise) -> int:
    """Return the number of weights; refuse another number of codes or scales."""
    check_kind("q", q, Blockwise)
    check_blocksize(q.blocksize)
    check_sizes("shape", q.shape)
    _check_bytes("packed", q.packed)
    check_shapes({"absmax": (q.absmax, "blocks")})
    n, bits = prod(q.shape), code_bits(q.codebook)
    needed = {"packed": -(-n * bits // 8), "absmax": -(-n // q.blocksize)}
    for name, wanted in needed.items():
        if (size := getattr(q, name).size) != wanted:
            raise InputError(
                f"{name} has {size} values where shape {list(q.shape)} and blocksize "
                f"{q.blocksize} need {wanted}; pass the parts of one quantized tensor."
            )
    bad = np.flatnonzero(~np.isfinite(q.absmax))
    if bad.size:
        raise InputError(
            f"absmax holds {q.absmax[bad[0]]} at block {bad[0]}; give finite scales."
        )
    return n


def check_finite(flat: Float[np.ndarray, " n"]) -> None:
    """Refuse NaN and infinities: one of them spoils the scale of its block."""
    check_floats("W", flat)
    bad = np.flatnonzero(~np.isfinite(flat))
    if bad.size:
        raise InputError(
            f"W holds {flat[bad[0]]} at flat index {bad[0]}, the first of {bad.size} "
            "values that are not finite; repair the weights before quantizing them."
        )


def _check_bits(bits: int) -> None:
    check_integer("bits", bits, 1, 8)


def _check_bytes(name: str, array: np.ndarray) -> None:
    check_array(name, array, "bytes")
    if array.dtype != np.uint8 or array.ndim != 1:
        raise InputError(
            f"{name} has dtype {array.dtype} and shape {array.shape}; give a list of "
            "bytes (uint8)."
        )
