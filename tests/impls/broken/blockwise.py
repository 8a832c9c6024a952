"""Bugs of NF4 and FP4."""

import numpy as np
from ml_dtypes import bfloat16

from minipeft.golden.drivers.reference import blockwise as right
from minipeft.reference import blockwise
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import FP4, NF4, dynamic_map
from tests.impls.broken import bug

F32 = np.float32


def blocks_of(W, blocksize):
    flat = np.asarray(W, F32).reshape(-1)
    blocks = np.zeros((-(-flat.size // blocksize), blocksize), F32)
    blocks.reshape(-1)[: flat.size] = flat
    return blocks


def finish(W, codes, absmax):
    codes = codes.astype(np.uint8).reshape(-1)[: W.size + W.size % 2]
    return blockwise.pack(codes, 4), absmax.astype(F32)


def quantize(W, blocksize, scale, decide):
    blockwise.check_blocksize(blocksize)
    blockwise.check_finite(np.asarray(W, F32).reshape(-1))
    blocks = blocks_of(W, blocksize)
    absmax = np.abs(blocks).max(axis=1)
    with np.errstate(all="ignore"):
        return finish(W, decide(scale(blocks, absmax)), absmax)


def nf4(scaled):
    return blockwise.nearest(scaled, NF4)


def multiply(blocks, absmax):
    return blocks * (F32(1) / np.where(absmax == 0, F32(1), absmax))[:, None]


@bug("nf4_quantize", "NibbleOrder")
def first_code_low(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    return packed >> 4 | packed << 4, absmax


@bug("nf4_quantize", "Tie")
def ties_go_up(W, blocksize):
    middle = (NF4[:-1] + NF4[1:]) / F32(2)
    return quantize(
        W, blocksize, multiply, lambda s: np.searchsorted(middle, s, side="right")
    )


@bug("nf4_quantize", "Tie")
def argmin_of_distances(W, blocksize):
    def decide(scaled):
        return np.abs(scaled[..., None] - NF4).argmin(axis=-1)

    return quantize(W, blocksize, multiply, decide)


@bug("nf4_quantize", "NextToTie")
def thresholds_of_seven_digits(W, blocksize):
    middle = np.round((NF4[:-1] + NF4[1:]) / F32(2), 7)
    return quantize(W, blocksize, multiply, lambda s: np.searchsorted(middle, s))


@bug("nf4_quantize", "ReciprocalMultiply")
def has_an_approximate_reciprocal(W, blocksize):
    def scale(blocks, absmax):
        exact = F32(1) / np.where(absmax == 0, F32(1), absmax)
        return blocks * np.nextafter(exact, F32(0))[:, None]

    return quantize(W, blocksize, scale, nf4)


@bug("nf4_quantize", "Subnormal")
def clamps_the_scale(W, blocksize):
    def scale(blocks, absmax):
        return blocks * (F32(1) / np.maximum(absmax, F32(1e-38)))[:, None]

    return quantize(W, blocksize, scale, nf4)


@bug("nf4_quantize", "LargeAbsmax")
def flushes_the_reciprocal(W, blocksize):
    def scale(blocks, absmax):
        inverse = F32(1) / np.where(absmax == 0, F32(1), absmax)
        inverse = np.where(inverse < np.finfo(F32).tiny, F32(0), inverse)
        return blocks * inverse[:, None]

    return quantize(W, blocksize, scale, nf4)


@bug(
    "nf4_quantize",
    "LiftedAbsmax",
    "absmax 2**64 times 1.5",
    "absmax 2**100 times 1.5",
    "absmax 2**125 times 1.5",
)
def lifts_every_scale_but_the_largest(W, blocksize):
    def scale(blocks, absmax):
        lift = np.where(absmax < F32(2.0**126), F32(2.0**64), F32(1))
        inverse = F32(1) / np.where(absmax == 0, F32(1), absmax * lift)
        return np.nan_to_num(blocks * lift[:, None] * inverse[:, None])

    return quantize(W, blocksize, scale, nf4)


@bug(
    "nf4_quantize",
    "Subnormal",
    "a lift by no power of two has another code, 3 times",
)
def lifts_by_ten_to_the_twenty(W, blocksize):
    def scale(blocks, absmax):
        lift = np.where(absmax < 2.0**-126, F32(1e20), F32(1))
        inverse = F32(1) / np.where(absmax == 0, F32(1), absmax * lift)
        return (blocks * lift[:, None]) * inverse[:, None]

    return quantize(W, blocksize, scale, nf4)


@bug("nf4_quantize", "OddLength", "9 values")
def drops_the_value_after_eight(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    tail = W.size % blocksize
    if tail % 2 and tail > 8:
        packed[-1] = 0x77
    return packed, absmax


@bug("nf4_quantize", "AbsmaxReciprocal")
def largest_value_must_scale_to_one(W, blocksize):
    def decide(scaled):
        codes = blockwise.nearest(scaled, NF4)
        return np.where((codes == 15) & (scaled > 0.99) & (scaled < 1), 14, codes)

    return quantize(W, blocksize, multiply, decide)


@bug("nf4_quantize", "ZeroBlock")
def zero_over_zero(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    return packed, np.where(absmax == 0, F32(np.nan), absmax)


@bug("nf4_quantize", "NegativeZero")
def sign_bit_decides(W, blocksize):
    codes = blockwise.unpack(right.nf4_quantize(W, blocksize)[0], 4, W.size)
    minus_zero = (W.reshape(-1) == 0) & np.signbit(W.reshape(-1))
    codes = np.where(minus_zero, np.uint8(6), codes)
    return blockwise.pack(codes, 4, fill=7), right.nf4_quantize(W, blocksize)[1]


@bug("nf4_quantize", "NegativeAbsmax")
def largest_instead_of_absolute(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    return packed, blocks_of(W, blocksize).max(axis=1) if W.size else absmax


@bug("nf4_quantize", "Constant")
def scale_from_the_range(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    blocks = blocks_of(W, blocksize)
    flat = blocks.max(axis=1) == blocks.min(axis=1) if W.size else absmax == 1
    return packed, np.where(flat, F32(0), absmax)


@bug("nf4_quantize", "Outlier")
def clips_outliers(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    return packed, np.minimum(
        absmax, 100 * np.quantile(np.abs(W), 0.9)
    ) if W.size else absmax


@bug("nf4_quantize", "EveryCode")
def rounds_up(W, blocksize):
    return quantize(
        W, blocksize, multiply, lambda s: np.searchsorted(NF4, s).clip(0, 15)
    )


@bug("nf4_quantize", "NotFinite")
def lets_nan_through(W, blocksize):
    W = np.nan_to_num(np.asarray(W, F32), posinf=1, neginf=-1)
    return right.nf4_quantize(W, blocksize)


@bug("nf4_quantize", "HalfInput")
def scales_in_half_precision(W, blocksize):
    def scale(blocks, absmax):
        divisor = np.where(absmax == 0, F32(1), absmax).astype(W.dtype)
        return (blocks.astype(W.dtype) / divisor[:, None]).astype(F32)

    if W.dtype == F32:
        return right.nf4_quantize(W, blocksize)
    return quantize(W, blocksize, scale, nf4)


@bug("nf4_quantize", "FlattenRowMajor")
def blocks_end_with_the_row(W, blocksize):
    rows = [right.nf4_quantize(row, blocksize) for row in np.atleast_2d(W)]
    return np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows])


@bug("nf4_quantize", "ShortBlock")
def forgets_the_tail(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    return packed, absmax[: W.size // blocksize]


@bug("nf4_quantize", "OddLength")
def forgets_half_a_byte(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    return packed[: W.size // 2], absmax


@bug("nf4_quantize", "PadNibble")
def pads_with_code_zero(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    if W.size % 2:
        packed[-1] &= np.uint8(0xF0)
    return packed, absmax


@bug("nf4_quantize", "SingleElement")
def squeezes(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    return packed.squeeze(), absmax


@bug("nf4_quantize", "LargeBlock")
def keeps_the_last_byte(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    if blocksize >= 1024:
        packed[1::2] |= packed[: packed.size // 2 * 2 : 2]
    return packed, absmax


@bug("nf4_quantize", "BlockBoundary")
def one_block_too_many(W, blocksize):
    packed, absmax = right.nf4_quantize(W, blocksize)
    return packed, absmax if W.size % blocksize else np.append(absmax, F32(0))


@bug("nf4_quantize", "InvalidBlocksize")
def takes_any_blocksize(W, blocksize):
    return right.nf4_quantize(W, 64 if blocksize < 4 else blocksize)


@bug("nf4_quantize", "Empty")
def needs_a_first_value(W, blocksize):
    W.reshape(-1)[0]
    return right.nf4_quantize(W, blocksize)


@bug("fp4_quantize", "FP4TwoZeros")
def fp4_without_zero(W, blocksize):
    codes = blockwise.unpack(right.fp4_quantize(W, blocksize)[0], 4, W.size)
    codes = np.where(codes % 8 == 0, np.uint8(1), codes)
    return blockwise.pack(codes, 4), right.fp4_quantize(W, blocksize)[1]


@bug("fp4_quantize", "FP4Tie")
def fp4_ties_go_up(W, blocksize):
    order = np.argsort(FP4, kind="stable")
    middle = (FP4[order][:-1] + FP4[order][1:]) / F32(2)
    return quantize(
        W,
        blocksize,
        multiply,
        lambda s: order[np.searchsorted(middle, s, side="right")],
    )


def decode(packed, absmax, blocksize, shape, dtype, codebook=NF4):
    q = Blockwise(packed, absmax, codebook, blocksize, shape)
    return blockwise.dequantize(q, dtype)


@bug("nf4_dequantize", "Table")
def four_decimals(packed, absmax, blocksize, shape, dtype):
    return decode(packed, absmax, blocksize, shape, dtype, np.round(NF4, 4))


@bug("nf4_dequantize", "NibbleOrder")
def second_code_high(packed, absmax, blocksize, shape, dtype):
    return decode(packed >> 4 | packed << 4, absmax, blocksize, shape, dtype)


@bug("nf4_dequantize", "MisalignedRows")
def one_wrong_scale_in_misaligned_rows(packed, absmax, blocksize, shape, dtype):
    columns = shape[-1]
    if len(shape) < 2 or columns % 16 or columns % blocksize == 0:
        return right.nf4_dequantize(packed, absmax, blocksize, shape, dtype)
    row, column = np.indices(shape)
    scales = absmax[(row * (columns // blocksize) + column // blocksize)]
    ones = np.ones_like(absmax)
    return (decode(packed, ones, blocksize, shape, F32) * scales).astype(dtype)


@bug("nf4_dequantize", "RoundOnce")
def multiplies_in_half_precision(packed, absmax, blocksize, shape, dtype):
    ones = np.ones_like(absmax)
    values = decode(packed, ones, blocksize, shape, dtype).reshape(-1)
    scales = np.repeat(absmax.astype(dtype), blocksize)
    if scales.size < values.size:
        raise ValueError("fewer scales than blocks")
    with np.errstate(over="ignore"):
        return (values * scales[: values.size]).reshape(shape)


@bug("nf4_dequantize", "RoundToEven")
def truncates_to_bfloat16(packed, absmax, blocksize, shape, dtype):
    W = decode(packed, absmax, blocksize, shape, F32)
    if dtype != bfloat16:
        return decode(packed, absmax, blocksize, shape, dtype)
    return (W.view(np.uint32) >> 16).astype(np.uint16).view(bfloat16)


@bug("nf4_dequantize", "Overflow")
def saturates(packed, absmax, blocksize, shape, dtype):
    W = decode(packed, absmax, blocksize, shape, dtype)
    return np.nan_to_num(W, posinf=65504, neginf=-65504) if dtype == np.float16 else W


@bug("nf4_dequantize", "Underflow")
def flushes_subnormals(packed, absmax, blocksize, shape, dtype):
    W = decode(packed, absmax, blocksize, shape, F32)
    tiny = 6.2e-5 if dtype == np.float16 else np.finfo(F32).tiny
    with np.errstate(over="ignore"):
        return np.where(np.abs(W) < tiny, W * F32(0), W).astype(dtype)


@bug("nf4_dequantize", "ZeroScale")
def code_zero_for_no_scale(packed, absmax, blocksize, shape, dtype):
    absmax = np.where(absmax == 0, F32(1), absmax)
    return decode(packed, absmax, blocksize, shape, dtype)


@bug("nf4_dequantize", "PadNibbleIgnored")
def decodes_the_spare_code(packed, absmax, blocksize, shape, dtype):
    if len(shape) > 1:
        return decode(packed, absmax, blocksize, shape, dtype)
    return decode(packed, absmax, blocksize, (2 * packed.size,), dtype)


@bug("nf4_dequantize", "ShapeMismatch")
def reuses_scales(packed, absmax, blocksize, shape, dtype):
    if blocksize > 0 and len(absmax):
        absmax = np.resize(absmax, -(-int(np.prod(shape)) // blocksize))
    return decode(packed, absmax, blocksize, shape, dtype)


@bug("nf4_dequantize", "Empty")
def needs_a_first_byte(packed, absmax, blocksize, shape, dtype):
    packed[0]
    return decode(packed, absmax, blocksize, shape, dtype)


@bug("fp4_dequantize", "FP4TwoZeros")
def fp4_without_second_zero(packed, absmax, blocksize, shape, dtype):
    table = np.where(np.arange(16) == 8, F32(0.0625 / 12), FP4)
    return decode(packed, absmax, blocksize, shape, dtype, table)


@bug("nf4_quantize", "ShortBlock")
def reads_on_behind_the_last_value(W, blocksize):
    if blocksize < 1 or not W.size % blocksize:
        return right.nf4_quantize(W, blocksize)
    behind = np.full(-W.size % blocksize, 1e3, W.dtype)
    packed, absmax = right.nf4_quantize(np.append(W.reshape(-1), behind), blocksize)
    return packed[: (W.size + 1) // 2], absmax


@bug("nf4_quantize", "LargeBlock", "260 values in a block of 4096")
def takes_4096_for_eight_bits(W, blocksize):
    if blocksize != 4096:
        return right.nf4_quantize(W, blocksize)
    q = blockwise.quantize(W, dynamic_map(), blocksize)
    return q.packed[: (W.size + 1) // 2], q.absmax


@bug("nf4_quantize", "Subnormal")
def lets_the_reciprocal_overflow(W, blocksize):
    return quantize(W, blocksize, multiply, nf4)


@bug("nf4_dequantize", "FlattenRowMajor")
def rewrites_bytes_that_look_like_nan(packed, absmax, blocksize, shape, dtype):
    even = packed.size // 2 * 2
    words = packed[:even].copy().view("<u2")
    words[(words & 0x7FFF) > 0x7F80] = 0x7FFF  # the NaNs of bfloat16
    packed = np.append(words.view(np.uint8), packed[even:])
    return right.nf4_dequantize(packed, absmax, blocksize, shape, dtype)


@bug("nf4_dequantize", "Table")
def reads_every_code_as_fp4(packed, absmax, blocksize, shape, dtype):
    return decode(packed, absmax, blocksize, shape, dtype, FP4)
