"""Bugs of IA3."""

import numpy as np

from minipeft.golden.drivers.reference import ia3 as right
from tests.impls.broken import bug

F32 = np.float32


@bug("ia3_merge", "SquareTrap")
def scales_the_other_side(W, l, side):  # noqa: E741
    if W.shape[0] == W.shape[1]:
        return right.ia3_merge(W, l, ("input" if side == "output" else "output"))
    return right.ia3_merge(W, l, side)


@bug("ia3_forward", "Keys")
def ignores_keys(x, W, l, side, bias=None):  # noqa: E741
    scale = l if side == "input" or len(l) != len(W) else np.ones_like(l)
    return right.ia3_forward(x, W, scale, side, bias)


@bug("ia3_forward", "FeedForward")
def ignores_feedforward(x, W, l, side, bias=None):  # noqa: E741
    scale = np.ones_like(l) if side == "input" and len(l) == W.shape[1] else l
    return right.ia3_forward(x, W, scale, side, bias)


@bug("ia3_forward", "Bias")
def adds_the_bias_last(x, W, l, side, bias=None):  # noqa: E741
    y = right.ia3_forward(x, W, l, side)
    return y if bias is None else y + bias


@bug("ia3_forward", "Start")
def starts_at_zero(x, W, l, side, bias=None):  # noqa: E741
    return right.ia3_forward(x, W, l - F32((l == 1).all()), side, bias)


@bug("ia3_merge", "ZeroFactor")
def makes_division_safe(W, l, side):  # noqa: E741
    return right.ia3_merge(W, l + F32(1e-8), side)


@bug("ia3_backward", "LeadingAxes")
def sums_the_first_axis_only_in_ia3(grad_y, x, W, l, side, bias=None):  # noqa: E741
    grads = right.ia3_backward(grad_y, x, W, l, side, bias)
    if x.ndim < 3:
        return grads
    first = right.ia3_backward(grad_y[:, 0], x[:, 0], W, l, side, bias)
    return grads[0], first[1]


@bug("ia3_forward", "Normal")
def ten_bits_inside_in_ia3(x, W, l, side, bias=None):  # noqa: E741
    x, W = (v.astype(np.float16).astype(F32) for v in (x, W))
    return right.ia3_forward(x, W, l, side, bias)


@bug("ia3_merge", "ShapeMismatch")
def broadcasts_one_number(W, l, side):  # noqa: E741
    if len(l) == 1:
        return W * l
    return right.ia3_merge(W, l, side)


@bug("ia3_forward", "Bias")
def scales_the_bias_twice(x, W, l, side, bias=None):  # noqa: E741
    fits = bias is not None and side == "output" and bias.shape == l.shape
    return right.ia3_forward(x, W, l, side, bias * l if fits else bias)
