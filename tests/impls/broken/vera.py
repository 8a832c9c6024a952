"""Bugs of VeRA."""

import numpy as np

from minipeft.golden.drivers.reference import vera as right
from tests.impls.broken import bug

F32 = np.float32


def _float16(*arrays):
    return (array.astype(np.float16).astype(F32) for array in arrays)


@bug("vera_projections", "Stream")
def seeds_one_further(seed, r, in_features, out_features):
    shift = 1 if 0 < seed < 2**32 - 1 else 0
    return right.vera_projections(seed + shift, r, in_features, out_features)


@bug("vera_projections", "FusedMultiplyAdd")
def rounds_twice(seed, r, in_features, out_features):
    A, B = right.vera_projections(seed, r, in_features, out_features)
    bound = F32(np.sqrt(6 / in_features))
    words = np.frombuffer(np.random.RandomState(seed).bytes(4 * A.size), "<u4")
    u = ((words & 0xFFFFFF) * 2.0**-24).astype(F32)
    return (u * (bound + bound) - bound).reshape(A.shape), B


@bug("vera_projections", "ZeroRank")
def draws_an_empty_pair(seed, r, in_features, out_features):
    A, B = right.vera_projections(seed, max(r, 1), in_features, out_features)
    return A[:r], B[:, :r]


@bug("vera_projections", "SeedRange")
def wraps_the_seed(seed, r, in_features, out_features):
    return right.vera_projections(seed % 2**32, r, in_features, out_features)


@bug("vera_forward", "Basic")
def forgets_d(x, W, A, B, d, b, bias=None):
    return right.vera_forward(x, W, A, B, np.sign(d) ** 2, b, bias)


@bug("vera_merge", "Unscaled")
def scales_like_lora(W, A, B, d, b):
    return right.vera_merge(W, A, B, d / F32(len(A)), b)


@bug("vera_merge", "Shared")
def uses_the_other_corners(W, A, B, d, b):
    return right.vera_merge(W, A[:, -W.shape[1] :], B[-W.shape[0] :], d, b)


@bug("vera_merge", "RankOne", "6 in, 5 out, r 1")
def squeezes_rank_one_in_vera(W, A, B, d, b):
    if len(d) > 1 or len(B) < len(W):
        return right.vera_merge(W, A, B, d, b)
    return W + b * (d * A[0])[:, None] * B.squeeze()


@bug("vera_merge", "ShapeMismatch", "B has one row, r 1")
def spreads_one_row_over_b(W, A, B, d, b):
    if len(B) == 1 == len(d):
        B = np.repeat(B, len(W), axis=0)
    return right.vera_merge(W, A, B, d, b)


@bug("vera_forward", "Bias")
def scales_the_bias_in_vera(x, W, A, B, d, b, bias=None):
    scaled = None if bias is None else b * bias
    return right.vera_forward(x, W, A, B, d, b, scaled)


@bug("vera_backward", "Start")
def no_gradient_where_b_is_zero_in_vera(grad_y, x, W, A, B, d, b):
    grads = right.vera_backward(grad_y, x, W, A, B, d, b)
    return (*grads[:2], grads[2] if b.any() else np.zeros_like(b))


@bug("vera_backward", "LeadingAxes")
def sums_the_first_axis_only_in_vera(grad_y, x, W, A, B, d, b):
    grads = right.vera_backward(grad_y, x, W, A, B, d, b)
    if x.ndim < 3:
        return grads
    first = right.vera_backward(grad_y[:, 0], x[:, 0], W, A, B, d, b)
    return grads[0], *first[1:]


@bug("vera_forward", "Normal")
def ten_bits_inside_in_vera(x, W, A, B, d, b, bias=None):
    return right.vera_forward(*_float16(x, W, A, B, d, b), bias)


@bug("vera_forward", "ShapeMismatch")
def fills_a_short_b(x, W, A, B, d, b, bias=None):
    b = np.pad(b, (0, max(0, len(W) - len(b))))
    return right.vera_forward(x, W, A, B, d, b, bias)
