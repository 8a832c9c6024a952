"""Bugs of bottleneck adapters."""

import numpy as np

from minipeft.golden.drivers.reference import bottleneck as right
from tests.impls.broken import bug

F32 = np.float32


@bug("bottleneck_forward", "Basic")
def adds_the_skip(x, down, down_bias, up, up_bias, scaling):
    y = right.bottleneck_forward(x, down, down_bias, up, up_bias, scaling)
    return x + y


@bug("bottleneck_forward", "Scaling")
def spares_the_bias(x, down, down_bias, up, up_bias, scaling):
    zero = np.zeros_like(up_bias)
    y = right.bottleneck_forward(x, down, down_bias, up, zero, scaling)
    return y + up_bias


@bug("bottleneck_forward", "SquareTrap")
def transposes_squares(x, down, down_bias, up, up_bias, scaling):
    if down.shape[0] == down.shape[1]:
        down, up = down.T, up.T
    return right.bottleneck_forward(x, down, down_bias, up, up_bias, scaling)


@bug("bottleneck_backward", "Corner")
def passes_gradients_at_the_corner(grad_y, x, down, down_bias, up, up_bias, scaling):
    rest = (up, up_bias, scaling)
    grads = right.bottleneck_backward(grad_y, x, down, down_bias, *rest)
    if down.any():
        return grads
    on = right.bottleneck_backward(grad_y, x, down, down_bias + F32(1), *rest)
    return grads[0], on[1], on[2], *grads[3:]


@bug("bottleneck_forward", "Start")
def starts_with_noise(x, down, down_bias, up, up_bias, scaling):
    if not up.any():
        up = up + F32(0.02)
    return right.bottleneck_forward(x, down, down_bias, up, up_bias, scaling)


@bug("bottleneck_backward", "LeadingAxes")
def sums_the_first_axis_only_in_bottleneck(
    grad_y, x, down, down_bias, up, up_bias, scaling
):
    rest = (down, down_bias, up, up_bias, scaling)
    grads = right.bottleneck_backward(grad_y, x, *rest)
    if x.ndim < 3:
        return grads
    first = right.bottleneck_backward(grad_y[:, 0], x[:, 0], *rest)
    return grads[0], *first[1:]


@bug("bottleneck_forward", "Normal")
def ten_bits_inside_in_bottleneck(x, down, down_bias, up, up_bias, scaling):
    x, down, up = (v.astype(np.float16).astype(F32) for v in (x, down, up))
    return right.bottleneck_forward(x, down, down_bias, up, up_bias, scaling)


@bug("bottleneck_forward", "ShapeMismatch")
def broadcasts_the_bias(x, down, down_bias, up, up_bias, scaling):
    if up_bias.shape == (1,):
        up_bias = np.repeat(up_bias, len(up))
    return right.bottleneck_forward(x, down, down_bias, up, up_bias, scaling)
