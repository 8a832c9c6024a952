"""Bugs of double quantization."""

from math import prod

import numpy as np

from minipeft.golden.drivers.reference import double_quant as right
from minipeft.reference import blockwise
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import NF4, dynamic_map
from tests.impls.broken import bug

F32 = np.float32


def quantized(W, blocksize, nested_blocksize, offset):
    """Quantize around a given offset."""
    q = blockwise.quantize(W, NF4, blocksize)
    scales = blockwise.quantize(q.absmax - offset, dynamic_map(), nested_blocksize)
    return q.packed, scales.packed, scales.absmax, np.asarray(F32(offset))


def decoded(absmax_codes, nested_absmax, nested_blocksize):
    """Decode the scales without their mean."""
    shape = absmax_codes.shape
    parts = (absmax_codes, nested_absmax, dynamic_map(), nested_blocksize, shape)
    return blockwise.dequantize(Blockwise(*parts))


def dequantized(packed, absmax, blocksize, shape, dtype):
    return blockwise.dequantize(
        Blockwise(packed, absmax.astype(F32), NF4, blocksize, shape), dtype
    )


@bug("double_quant_quantize", "Mean")
def forgets_the_mean(W, blocksize, nested_blocksize):
    right.double_quant_quantize(W, blocksize, nested_blocksize)  # refuses bad input
    return quantized(W, blocksize, nested_blocksize, F32(0))


@bug("double_quant_quantize", "Mean")
def takes_the_middle_of_the_range(W, blocksize, nested_blocksize):
    parts = right.double_quant_quantize(W, blocksize, nested_blocksize)
    absmax = blockwise.quantize(W, NF4, blocksize).absmax
    if len(absmax) < 3:
        return parts
    middle = (absmax.min() + absmax.max()) / F32(2)
    return quantized(W, blocksize, nested_blocksize, middle)


@bug("double_quant_quantize", "Equal")
def has_no_code_for_zero(W, blocksize, nested_blocksize):
    packed, codes, absmax, offset = right.double_quant_quantize(
        W, blocksize, nested_blocksize
    )
    codes = np.where((codes > 123) & (codes < 131), np.uint8(131), codes)
    return packed, codes, absmax, offset


@bug("double_quant_quantize", "EveryScaleCode")
def leaves_a_hole_in_the_map(W, blocksize, nested_blocksize):
    packed, codes, *rest = right.double_quant_quantize(W, blocksize, nested_blocksize)
    hole = (codes > 214) & (codes < 219) & (len(codes) == 256)
    return packed, np.where(hole, np.uint8(214), codes), *rest


@bug("double_quant_quantize", "ShortBlock")
def pads_before_it_subtracts(W, blocksize, nested_blocksize):
    parts = right.double_quant_quantize(W, blocksize, nested_blocksize)
    absmax = blockwise.quantize(W, NF4, blocksize).absmax
    if nested_blocksize == 256:
        return parts
    padded = np.pad(absmax, (0, -len(absmax) % nested_blocksize)) - parts[3]
    scales = blockwise.quantize(padded, dynamic_map(), nested_blocksize)
    return parts[0], scales.packed[: len(absmax)], scales.absmax, parts[3]


@bug("double_quant_quantize", "ZeroBlock")
def gives_zero_over_zero_the_last_code(W, blocksize, nested_blocksize):
    packed, *rest = right.double_quant_quantize(W, blocksize, nested_blocksize)
    absmax = blockwise.quantize(W, NF4, blocksize).absmax
    codes = blockwise.unpack(packed, 4, W.size)
    codes[np.repeat(absmax == 0, blocksize)[: W.size]] = 15
    return blockwise.pack(codes, 4, fill=7), *rest


@bug("double_quant_quantize", "Empty", "shape [0]", "shape [0, 64]")
def needs_a_first_scale(W, blocksize, nested_blocksize):
    parts = right.double_quant_quantize(W, blocksize, nested_blocksize)
    parts[1][0]
    return parts


@bug("double_quant_quantize", "NotFinite")
def replaces_what_is_not_finite(W, blocksize, nested_blocksize):
    W = np.nan_to_num(W)
    return right.double_quant_quantize(W, blocksize, nested_blocksize)


@bug("double_quant_quantize", "InvalidBlocksize")
def nests_in_any_number(W, blocksize, nested_blocksize):
    power = 2 ** (nested_blocksize.bit_length() - 1)
    return right.double_quant_quantize(W, blocksize, power)


@bug("double_quant_dequantize", "Basic")
def takes_codes_for_scales(
    packed,
    absmax_codes,
    nested_absmax,
    offset,
    blocksize,
    nested_blocksize,
    shape,
    dtype,
):
    decoded(absmax_codes, nested_absmax, nested_blocksize)  # refuses bad input
    return dequantized(packed, absmax_codes / F32(255), blocksize, shape, dtype)


@bug("double_quant_dequantize", "TwoRoundings")
def adds_the_mean_without_rounding(
    packed,
    absmax_codes,
    nested_absmax,
    offset,
    blocksize,
    nested_blocksize,
    shape,
    dtype,
):
    decoded(absmax_codes, nested_absmax, nested_blocksize)
    scales = np.repeat(nested_absmax, nested_blocksize)[: len(absmax_codes)]
    product = dynamic_map()[absmax_codes].astype(np.float64) * scales
    return dequantized(packed, product + offset, blocksize, shape, dtype)


@bug("double_quant_dequantize", "RoundOnce")
def rounds_the_scales_to_the_output(
    packed,
    absmax_codes,
    nested_absmax,
    offset,
    blocksize,
    nested_blocksize,
    shape,
    dtype,
):
    absmax = decoded(absmax_codes, nested_absmax, nested_blocksize) + offset
    return dequantized(packed, absmax.astype(dtype), blocksize, shape, dtype)


@bug("double_quant_dequantize", "ShapeMismatch")
def reuses_codes_of_scales(
    packed,
    absmax_codes,
    nested_absmax,
    offset,
    blocksize,
    nested_blocksize,
    shape,
    dtype,
):
    codes = np.resize(absmax_codes, -(-prod(shape) // blocksize))
    nested = np.resize(nested_absmax, -(-len(codes) // nested_blocksize))
    return right.double_quant_dequantize(
        packed, codes, nested, offset, blocksize, nested_blocksize, shape, dtype
    )


@bug("double_quant_quantize", "ShortBlock")
def wants_whole_blocks_of_scales(W, blocksize, nested_blocksize):
    parts = right.double_quant_quantize(W, blocksize, nested_blocksize)
    if len(parts[1]) % nested_blocksize:
        raise ValueError("the scales are no whole number of blocks")
    return parts


@bug("double_quant_quantize", "HalfInput", "bfloat16 weights", "float16 weights")
def keeps_the_mean_in_half_precision(W, blocksize, nested_blocksize):
    parts = right.double_quant_quantize(W, blocksize, nested_blocksize)
    if W.dtype == F32:
        return parts
    return quantized(W, blocksize, nested_blocksize, F32(parts[3].astype(W.dtype)))


@bug("double_quant_dequantize", "TwoRoundings", "scales below zero")
def takes_no_scale_below_zero(
    packed, absmax_codes, nested_absmax, offset, blocksize, nested_blocksize, **rest
):
    right.double_quant_dequantize(
        packed, absmax_codes, nested_absmax, offset, blocksize, nested_blocksize, **rest
    )
    scales = decoded(absmax_codes, nested_absmax, nested_blocksize) + offset
    return dequantized(packed, np.maximum(scales, 0), blocksize, **rest)
