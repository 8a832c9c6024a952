"""Bugs of MiSS."""

import numpy as np

from minipeft.golden.drivers.reference import miss as right
from tests.impls.broken import bug

F32 = np.float32


@bug("miss_merge", "Basic")
def repeats_each_row_for_neighbours(W, D):
    merged = right.miss_merge(W, D)
    return W + D[np.arange(W.shape[1]) * len(D) // W.shape[1]].T if len(D) else merged


@bug("miss_merge", "SquareTrap", "square: 4 in, 4 out, r 4")
def takes_d_for_its_transpose(W, D):
    return right.miss_merge(W, D.T if D.shape == W.shape else D)


@bug("miss_forward", "ShortShard")
def leaves_out_what_is_left_over(x, W, D, bias=None):
    short = x.copy()
    if len(D) and x.shape[-1] == W.shape[1]:
        short[..., W.shape[1] - W.shape[1] % len(D) :] = 0
    y = right.miss_forward(x, W, np.zeros_like(D), bias)
    return y + right.miss_forward(short, np.zeros_like(W), D)


@bug("miss_forward", "RankOne", "6 in, 5 out, r 1")
def squeezes_rank_one_in_miss(x, W, D, bias=None):
    return right.miss_forward(x, W, D.squeeze(), bias)


@bug("miss_backward", "Start", "D is zero")
def no_gradient_where_d_is_zero(grad_y, x, W, D):
    grad_x, grad_D = right.miss_backward(grad_y, x, W, D)
    return grad_x, grad_D if D.any() else np.zeros_like(D)


@bug("miss_backward", "LeadingAxes", "two leading axes")
def sums_the_first_axis_only_in_miss(grad_y, x, W, D):
    grads = right.miss_backward(grad_y, x, W, D)
    if x.ndim < 3:
        return grads
    return grads[0], right.miss_backward(grad_y[:, 0], x[:, 0], W, D)[1]


@bug("miss_forward", "Bias", "with bias")
def adds_the_bias_twice_in_miss(x, W, D, bias=None):
    twice = None if bias is None else bias + bias
    return right.miss_forward(x, W, D, twice)


@bug("miss_forward", "Normal")
def ten_bits_inside_in_miss(x, W, D, bias=None):
    x, W, D = (v.astype(np.float16).astype(F32) for v in (x, W, D))
    return right.miss_forward(x, W, D, bias)


@bug("miss_merge", "ShapeMismatch", "D has one column alone")
def spreads_one_column_over_d(W, D):
    if D.shape[1] == 1:
        D = np.repeat(D, len(W), axis=1)
    return right.miss_merge(W, D)


@bug("miss_merge", "ZeroRank")
def takes_no_rows_in_miss(W, D):
    return right.miss_merge(W, D) if len(D) else W.copy()
