"""Bugs of MXFP4 and NVFP4."""

import numpy as np

from minipeft.golden.drivers.reference import microscaling as right
from minipeft.reference.microscaling import E2M1, E4M3
from tests.impls.broken import bug

F32 = np.float32
VALUES = np.concatenate([E2M1, -E2M1])


def swapped(packed):
    return packed << np.uint8(4) | packed >> np.uint8(4)


def codes(packed):
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def nibbles(codes):
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def scaled(W, scales, size):
    """Return the values that E2M1 rounds."""
    blocks = W.reshape(*scales.shape, size).astype(np.float64)
    return blocks / 2.0 ** (scales[..., None].astype(float) - 127)


@bug("mxfp4_quantize", "Basic")
def rounds_the_power_up(W):
    packed, scales = right.mxfp4_quantize(W)
    up = np.where(np.abs(scaled(W, scales, 32)).max(-1) > 4, scales + 1, scales)
    return packed, up.astype(np.uint8)


@bug("mxfp4_quantize", "Outlier")
def clips_at_ten_times_the_mean(W):
    limit = 10 * np.abs(W).astype(np.float64).mean() or 1
    wild = np.abs(W).max(initial=0) > 20 * limit / 10
    return right.mxfp4_quantize(W.clip(-limit, limit).astype(F32) if wild else W)


@bug("mxfp4_quantize", "NibbleOrder")
def writes_the_first_code_high(W):
    packed, scales = right.mxfp4_quantize(W)
    return swapped(packed), scales


@bug("mxfp4_quantize", "EveryCode")
def has_no_half(W):
    packed, scales = right.mxfp4_quantize(W)
    found = codes(packed)
    return nibbles(np.where(found % 8 == 1, found - 1, found)), scales


@bug("mxfp4_quantize", "Tie", "every midpoint")
def sends_ties_to_the_lower_code(W):
    packed, scales = right.mxfp4_quantize(W)
    middle, x = (E2M1[:-1] + E2M1[1:]) / 2, np.abs(scaled(W, scales, 32))
    tie = (x[..., None] == middle).any(-1).reshape(W.shape)
    found = codes(packed)
    down = tie & (E2M1[found % 8] > x.reshape(W.shape))
    return nibbles(np.where(down, found - 1, found)), scales


@bug("mxfp4_quantize", "NextToTie")
def rounds_through_half_precision(W):
    if not np.abs(W).max(initial=0) < 10:
        return right.mxfp4_quantize(W)
    return right.mxfp4_quantize(W.astype(np.float16).astype(F32))


@bug("mxfp4_quantize", "Saturation")
def wraps_above_six(W):
    packed, scales = right.mxfp4_quantize(W)
    above = (np.abs(scaled(W, scales, 32)) >= 7).reshape(W.shape)
    found = codes(packed)
    return nibbles(np.where(above, found & 8, found)), scales


@bug("mxfp4_quantize", "ZeroBlock")
def gives_zeros_the_power_of_one(W):
    packed, scales = right.mxfp4_quantize(W)
    zero = ~W.reshape(*scales.shape, 32).any(-1)
    return packed, np.where(zero, np.uint8(127), scales)


@bug("mxfp4_quantize", "NegativeZero")
def gives_zero_no_sign(W):
    packed, scales = right.mxfp4_quantize(W)
    found = codes(packed)
    return nibbles(np.where(found == 8, 0, found)), scales


@bug("mxfp4_quantize", "Subnormal")
def flushes_to_zero(W):
    tiny = np.finfo(F32).tiny
    return right.mxfp4_quantize(np.where(np.abs(W) < tiny, F32(0), W))


@bug("mxfp4_quantize", "LargeAbsmax", "the largest float32")
def overflows_while_it_scales(W):
    packed, scales = right.mxfp4_quantize(W)
    return packed, np.minimum(scales, np.uint8(250))


@bug("mxfp4_quantize", "NotFinite")
def takes_what_is_not_finite_for_zero(W):
    return right.mxfp4_quantize(np.where(np.isfinite(W), W, F32(0)))


@bug("mxfp4_quantize", "WholeBlocks")
def lets_blocks_run_across_rows(W):
    if not W.size % 32 and W.shape[-1] % 32:
        return right.mxfp4_quantize(W.reshape(-1, 32))
    return right.mxfp4_quantize(W)


@bug("mxfp4_dequantize", "Basic")
def has_one_scale_for_all_rows(packed, scales, dtype):
    right.mxfp4_dequantize(packed, scales, dtype)
    return right.mxfp4_dequantize(
        packed, np.broadcast_to(scales[:1], scales.shape), dtype
    )


@bug("mxfp4_dequantize", "NibbleOrder")
def reads_the_first_code_high(packed, scales, dtype):
    return right.mxfp4_dequantize(swapped(packed), scales, dtype)


@bug("mxfp4_dequantize", "Table")
def knows_no_power_below_2_to_the_minus_126(packed, scales, dtype):
    return right.mxfp4_dequantize(packed, np.maximum(scales, np.uint8(1)), dtype)


@bug("mxfp4_dequantize", "NotFinite")
def takes_nan_for_a_power(packed, scales, dtype):
    return right.mxfp4_dequantize(packed, np.minimum(scales, np.uint8(254)), dtype)


@bug("mxfp4_dequantize", "ShapeMismatch", "a scale too many")
def leaves_scales_over(packed, scales, dtype):
    return right.mxfp4_dequantize(packed, scales[..., : packed.shape[-1] // 16], dtype)


@bug("nvfp4_dequantize", "RoundOnce")
def rounds_the_scale_to_the_output(packed, scales, tensor_scale, dtype):
    right.nvfp4_dequantize(packed, scales, tensor_scale, dtype)
    factor = (E4M3[scales] * tensor_scale).astype(dtype).astype(F32)
    blocks = VALUES[codes(packed)].reshape(*scales.shape, 16) * factor[..., None]
    return blocks.reshape(*packed.shape[:-1], -1).astype(dtype)


@bug("nvfp4_dequantize", "EveryE4M3", "every scale")
def flushes_small_scales(packed, scales, tensor_scale, dtype):
    small = (scales < 8) & (scales > 1)
    return right.nvfp4_dequantize(
        packed, np.where(small, np.uint8(0), scales), tensor_scale, dtype
    )


@bug("nvfp4_quantize", "Underflow")
def lifts_small_scales(W):
    packed, scales, tensor_scale = right.nvfp4_quantize(W)
    return packed, np.where(scales == 2, np.uint8(3), scales), tensor_scale


@bug("nvfp4_quantize", "EveryE4M3")
def truncates_scales(W):
    packed, scales, tensor_scale = right.nvfp4_quantize(W)
    absmax = np.abs(W.reshape(*scales.shape, 16)).max(-1)
    exact = absmax / (6 * tensor_scale or F32(1))
    return packed, scales - (E4M3[scales] > exact).astype(np.uint8), tensor_scale


@bug("nvfp4_quantize", "Basic")
def scales_each_row_for_itself(W):
    packed, scales, _ = right.nvfp4_quantize(W)
    rows = np.abs(W).reshape(-1, W.shape[-1]).max(-1) / F32(2688)
    return packed, scales, rows.mean().reshape(())


@bug("nvfp4_dequantize", "Table")
def forgets_the_scale_of_all(packed, scales, tensor_scale, dtype):
    one = np.asarray(F32(1))
    right.nvfp4_dequantize(packed, scales, tensor_scale, dtype)
    return right.nvfp4_dequantize(packed, scales, one, dtype)


@bug("mxfp4_quantize", "Tie")
def rounds_ties_away_from_zero(W):
    packed, scales = right.mxfp4_quantize(W)
    middle, x = (E2M1[:-1] + E2M1[1:]) / 2, np.abs(scaled(W, scales, 32))
    tie = (x[..., None] == middle).any(-1).reshape(W.shape)
    found = codes(packed)
    up = tie & (E2M1[found % 8] < x.reshape(W.shape))
    return nibbles(np.where(up, found + 1, found)), scales


@bug("mxfp4_quantize", "Basic")
def divides_by_a_scale_that_it_does_not_store(W):
    packed, scales = right.mxfp4_quantize(W)
    blocks = np.abs(W.reshape(*scales.shape, 32)).astype(np.float64)
    largest = blocks.max(-1, keepdims=True, initial=0)
    exact = blocks * 6 / np.where(largest == 0, 1, largest)
    found = np.abs(exact[..., None] - E2M1).argmin(-1).reshape(W.shape)
    return nibbles((codes(packed) & 8 | found).astype(np.uint8)), scales


@bug("mxfp4_quantize", "NextToTie")
def loses_all_below_one_half(W):
    packed, scales = right.mxfp4_quantize(W)
    below = (np.abs(scaled(W, scales, 32)) < 0.5).reshape(W.shape)
    found = codes(packed)
    return nibbles(np.where(below, found & 8, found)), scales


@bug("nvfp4_quantize", "ZeroBlock")
def gives_zeros_the_scale_nan(W):
    packed, scales, tensor_scale = right.nvfp4_quantize(W)
    zero = ~W.reshape(*scales.shape, 16).any(-1)
    return packed, np.where(zero, np.uint8(0x7F), scales), tensor_scale


@bug("nvfp4_quantize", "ZeroBlock", "6 in a block whose scale rounds to zero")
def divides_by_one_where_a_scale_is_zero(W):
    packed, scales, tensor_scale = right.nvfp4_quantize(W)
    blocks = np.abs(W.reshape(*scales.shape, 16))
    bare = np.abs(blocks[..., None] - E2M1).argmin(-1)
    found = codes(packed).reshape(blocks.shape)
    wrong = np.where(scales[..., None] == 0, found & 8 | bare, found)
    return nibbles(wrong.reshape(W.shape)), scales, tensor_scale


@bug(
    "nvfp4_quantize",
    "Subnormal",
    "a tensor_scale rounded down, so that 448 is too small",
)
def gives_a_scale_above_448_as_nan(W):
    packed, scales, tensor_scale = right.nvfp4_quantize(W)
    absmax = np.abs(W.reshape(*scales.shape, 16)).max(-1)
    above = absmax > 464 * 6 * tensor_scale
    return packed, np.where(above, np.uint8(0x7F), scales), tensor_scale


@bug("nvfp4_dequantize", "ZeroScale", "every code, tensor_scale 0")
def takes_zero_for_no_scale_at_all(packed, scales, tensor_scale, dtype):
    given = tensor_scale if np.any(tensor_scale) else np.asarray(F32(1))
    return right.nvfp4_dequantize(packed, scales, given, dtype)


@bug("nvfp4_dequantize", "OutOfRange", "tensor_scale is -1")
def drops_the_sign_of_the_scale_of_all(packed, scales, tensor_scale, dtype):
    size = np.asarray(np.abs(tensor_scale))
    return right.nvfp4_dequantize(packed, scales, size, dtype)


@bug("nvfp4_dequantize", "ShapeMismatch", "two for tensor_scale")
def reads_the_first_scale_of_all(packed, scales, tensor_scale, dtype):
    first = np.asarray(tensor_scale.reshape(-1)[0])
    return right.nvfp4_dequantize(packed, scales, first, dtype)


@bug("mxfp4_dequantize", "Basic", "three axes")
def flattens_all_but_the_first_axis(packed, scales, dtype):
    W = right.mxfp4_dequantize(packed, scales, dtype)
    return W.reshape(packed.shape[0], -1)
