"""Bugs of HiRA."""

import numpy as np

from minipeft.golden.drivers.reference import hira as right
from minipeft.golden.drivers.reference import lora
from tests.impls.broken import bug

F32 = np.float32


@bug("hira_merge", "Basic")
def adds_what_lora_adds(W, A, B, scaling):
    right.hira_merge(W, A, B, scaling)
    return lora.lora_merge(W, A, B, scaling * len(A), False)


@bug("hira_forward", "Scaling")
def has_no_scaling(x, W, A, B, scaling, bias=None):
    return right.hira_forward(x, W, A, B, 1.0, bias)


@bug("hira_backward", "Scaling")
def scales_no_gradient(grad_y, x, W, A, B, scaling):
    grad_x, grad_A, grad_B = right.hira_backward(grad_y, x, W, A, B, scaling)
    return grad_x, grad_A / F32(scaling), grad_B / F32(scaling)


@bug("hira_forward", "Orientation")
def wants_both_thin_matrices_exchanged(x, W, A, B, scaling, bias=None):
    return right.hira_forward(x, W, B.T, A.T, scaling, bias)


@bug("hira_merge", "SquareTrap", "square: 4 in, 4 out, r 4")
def transposes_the_factor(W, A, B, scaling):
    if W.shape[0] != W.shape[1]:
        return right.hira_merge(W, A, B, scaling)
    return right.hira_merge(W, B.T, A.T, scaling)


@bug("hira_forward", "RankOne", "6 in, 5 out, r 1")
def squeezes_rank_one_in_hira(x, W, A, B, scaling, bias=None):
    return right.hira_forward(x, W, A.squeeze(), B.squeeze(), scaling, bias)


@bug("hira_backward", "Start")
def no_gradient_where_b_is_zero_in_hira(grad_y, x, W, A, B, scaling):
    grads = right.hira_backward(grad_y, x, W, A, B, scaling)
    return (*grads[:2], grads[2] if B.any() else np.zeros_like(B))


@bug("hira_backward", "LeadingAxes")
def sums_the_first_axis_only_in_hira(grad_y, x, W, A, B, scaling):
    grads = right.hira_backward(grad_y, x, W, A, B, scaling)
    if x.ndim < 3:
        return grads
    first = right.hira_backward(grad_y[:, 0], x[:, 0], W, A, B, scaling)
    return grads[0], *first[1:]


@bug("hira_forward", "Bias", "with bias")
def multiplies_the_bias_in_hira(x, W, A, B, scaling, bias=None):
    scaled = None if bias is None else F32(scaling) * bias
    return right.hira_forward(x, W, A, B, scaling, scaled)


@bug("hira_forward", "Normal")
def ten_bits_inside_in_hira(x, W, A, B, scaling, bias=None):
    x, W, A, B = (v.astype(np.float16).astype(F32) for v in (x, W, A, B))
    return right.hira_forward(x, W, A, B, scaling, bias)


@bug("hira_merge", "ShapeMismatch", "B has one row alone")
def spreads_one_row_over_the_factor(W, A, B, scaling):
    if len(B) == 1:
        B = np.repeat(B, len(W), axis=0)
    return right.hira_merge(W, A, B, scaling)


@bug("hira_merge", "ZeroRank")
def takes_rank_zero_in_hira(W, A, B, scaling):
    return W.copy() if not len(A) else right.hira_merge(W, A, B, scaling)
