"""Bugs of BOF4-S."""

import numpy as np

from minipeft.golden.cases.bof4 import FROM_SAMPLES
from minipeft.golden.drivers.reference import blockwise as nf4
from minipeft.golden.drivers.reference import bof4 as right
from minipeft.reference import blockwise
from minipeft.reference.bof4 import BOF4_S
from tests.impls.broken import bug

F32 = np.float32


def with_scales(W, blocksize, change):
    """Quantize with other scales than the signed absmax."""
    right.bof4_quantize(W, blocksize)  # refuses bad input
    flat = W.reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % blocksize)).reshape(-1, blocksize)
    scales = change(blocks).astype(F32)
    codes = blockwise.nearest(blockwise.scale(blocks, scales), BOF4_S)
    return blockwise.pack(codes.reshape(-1)[: len(flat)], 4, fill=7), scales


@bug("bof4_quantize", "Basic")
def takes_the_sign_from_the_scale(W, blocksize):
    return with_scales(W, blocksize, lambda blocks: np.abs(blocks).max(axis=1))


@bug("bof4_quantize", "FirstLargest", "[-2, 2, 1]: two are the largest")
def takes_the_positive_of_two(W, blocksize):
    def largest(blocks):
        high, low = blocks.max(axis=1), blocks.min(axis=1)
        return np.where(high >= -low, high, low)

    return with_scales(W, blocksize, largest)


@bug("bof4_quantize", "EveryCode")
def rounds_the_codebook(W, blocksize):
    packed, scales = right.bof4_quantize(W, blocksize)
    codes = blockwise.unpack(packed, 4, W.size)
    return blockwise.pack(
        np.where(codes == 14, 13, codes).astype(np.uint8), 4, 7
    ), scales


@bug("bof4_quantize", "Tie")
def sends_a_tie_up(W, blocksize):
    above = np.nextafter(W, np.where(W < 0, F32(-9), F32(9)))
    normal = np.abs(W).max(initial=0) == 1
    return right.bof4_quantize(above if normal else W, blocksize)


@bug("bof4_quantize", "ZeroBlock")
def divides_zero_by_zero_in_bof4(W, blocksize):
    packed, scales = right.bof4_quantize(W, blocksize)
    codes = blockwise.unpack(packed, 4, W.size)
    codes[np.repeat(scales == 0, blocksize)[: W.size]] = 0
    return blockwise.pack(codes, 4, fill=7), scales


@bug("bof4_quantize", "Subnormal")
def flushes_the_block(W, blocksize):
    tiny = np.finfo(F32).tiny
    return right.bof4_quantize(np.where(np.abs(W) < tiny, F32(0), W), blocksize)


@bug("bof4_quantize", "FlattenRowMajor")
def begins_a_block_in_each_row(W, blocksize):
    packed, scales = right.bof4_quantize(W, blocksize)
    if W.ndim < 2 or W.shape[1] == blocksize:
        return packed, scales
    return packed, np.array([right.bof4_quantize(row, blocksize)[1][0] for row in W])


@bug("bof4_quantize", "OddLength")
def pads_with_code_zero_in_bof4(W, blocksize):
    packed, scales = right.bof4_quantize(W, blocksize)
    if W.size % 2:
        packed[-1] &= 240
    return packed, scales


@bug("bof4_quantize", "NotFinite")
def replaces_infinity(W, blocksize):
    return right.bof4_quantize(np.nan_to_num(W), blocksize)


@bug("bof4_quantize", "InvalidBlocksize")
def takes_the_next_power(W, blocksize):
    return right.bof4_quantize(W, 1 << (blocksize - 1).bit_length())


@bug("bof4_dequantize", "NegativeAbsmax")
def takes_the_scale_for_positive(packed, absmax, blocksize, shape, dtype):
    return right.bof4_dequantize(packed, np.abs(absmax), blocksize, shape, dtype)


@bug("bof4_dequantize", "RoundOnce")
def multiplies_in_the_output(packed, absmax, blocksize, shape, dtype):
    right.bof4_dequantize(packed, absmax, blocksize, shape, dtype)
    codes = blockwise.unpack(packed, 4, int(np.prod(shape)))
    scales = np.repeat(absmax, blocksize)[: len(codes)].astype(dtype)
    return (BOF4_S[codes].astype(dtype) * scales).reshape(shape)


@bug("bof4_dequantize", "Table")
def decodes_with_nf4(packed, absmax, blocksize, shape, dtype):
    return nf4.nf4_dequantize(packed, absmax, blocksize, shape, dtype)


@bug("bof4_dequantize", "ShortBlock")
def forgets_the_short_block(packed, absmax, blocksize, shape, dtype):
    if len(absmax) > 1 and shape[0] % blocksize:
        absmax = np.append(absmax[:-1], absmax[-2])
    return right.bof4_dequantize(packed, absmax, blocksize, shape, dtype)


@bug("bof4_dequantize", "ShapeMismatch")
def drops_a_scale_too_many(packed, absmax, blocksize, shape, dtype):
    count = -(-int(np.prod(shape)) // blocksize)
    return right.bof4_dequantize(packed, absmax[:count], blocksize, shape, dtype)


@bug("bof4_quantize", "BlockBoundary")
def takes_blocks_of_64(W, blocksize):
    right.bof4_quantize(W, blocksize)
    return right.bof4_quantize(W, 64)


@bug("bof4_quantize", "LargeBlock", "130 values in a block of 4096")
def has_room_for_128_values(W, blocksize):
    return right.bof4_quantize(W, min(blocksize, 128))


@bug("bof4_quantize", "HalfInput", "float16 weights", "bfloat16 weights")
def scales_bof4_in_half_precision(W, blocksize):
    packed, scales = right.bof4_quantize(W, blocksize)
    if W.dtype == F32:
        return packed, scales
    coarse = (W / scales.astype(W.dtype)).astype(F32)
    return blockwise.pack(blockwise.nearest(coarse, BOF4_S), 4, fill=7), scales


@bug(
    "bof4_quantize",
    "LiftedAbsmax",
    "a = 1.5 * 2**64",
    "a = 1.5 * 2**125",
    "a = -1.5 * 2**125",
)
def lifts_every_block(W, blocksize):
    packed, scales = right.bof4_quantize(W, blocksize)
    with np.errstate(over="ignore"):
        lost = np.isinf(scales * F32(2.0**64))
    codes = blockwise.unpack(packed, 4, W.size)
    codes[np.repeat(lost, blocksize)[: W.size]] = 7
    return blockwise.pack(codes, 4, fill=7), scales


@bug("bof4_quantize", "Subnormal", "a = -1e-42")
def overflows_the_reciprocal(W, blocksize):
    packed, scales = right.bof4_quantize(W, blocksize)
    blocks = np.pad(W.reshape(-1).astype(F32), (0, -W.size % blocksize))
    with np.errstate(all="ignore"):
        reciprocal = F32(1) / scales[:, None]
        scaled = np.nan_to_num(blocks.reshape(-1, blocksize) * reciprocal)
    if not np.isinf(reciprocal[scales != 0]).any():
        return packed, scales
    codes = blockwise.nearest(scaled, BOF4_S).reshape(-1)[: W.size]
    return blockwise.pack(codes, 4, fill=7), scales


@bug("bof4_quantize", "ReciprocalMultiply")
def divides_bof4_in_float64(W, blocksize):
    _, scales = right.bof4_quantize(W, blocksize)
    divisor = np.repeat(scales.astype(np.float64), blocksize)[: W.size]
    exact = W.reshape(-1).astype(np.float64) / np.where(divisor == 0, 1, divisor)
    middle = (BOF4_S[:-1] + BOF4_S[1:]) / F32(2)
    codes = np.searchsorted(middle.astype(np.float64), exact).astype(np.uint8)
    return blockwise.pack(codes, 4, fill=7), scales


@bug("bof4_dequantize", "BlockBoundary")
def decodes_blocks_of_64(packed, absmax, blocksize, shape, dtype):
    right.bof4_dequantize(packed, absmax, blocksize, shape, dtype)
    absmax = np.resize(absmax, -(-int(np.prod(shape)) // 64))
    return right.bof4_dequantize(packed, absmax, 64, shape, dtype)


@bug("bof4_dequantize", "OddLength", "65 values", "65 values, the spare code is 0")
def loses_the_last_of_an_odd_number(packed, absmax, blocksize, shape, dtype):
    W = right.bof4_dequantize(packed, absmax, blocksize, shape, dtype)
    if W.size % 2:
        W[-1] = 0
    return W


BOTH_SIDES = ("both sides of every midpoint", "the same of the paper's table")


def with_table(W, blocksize, table):
    """Quantize with another codebook."""
    _, scales = right.bof4_quantize(W, blocksize)
    blocks = np.pad(W.reshape(-1).astype(F32), (0, -W.size % blocksize))
    scaled = blockwise.scale(blocks.reshape(-1, blocksize), scales)
    codes = blockwise.nearest(scaled, table).reshape(-1)[: W.size]
    return blockwise.pack(codes, 4, fill=7), scales


@bug("bof4_quantize", "NextToTie", BOTH_SIDES[0])
def takes_one_code_of_another_table(W, blocksize):
    mixed = BOF4_S.copy()
    mixed[13] = FROM_SAMPLES[13]
    return with_table(W, blocksize, mixed)


@bug("bof4_quantize", "NextToTie", *BOTH_SIDES)
def cuts_a_code_of_bof4_to_four_digits(W, blocksize):
    cut = BOF4_S.copy()
    cut[6] = F32(-0.0938)
    return with_table(W, blocksize, cut)
