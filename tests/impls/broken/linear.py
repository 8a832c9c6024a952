"""Bugs of the linear layer."""

import numpy as np

from minipeft.golden.drivers.reference import linear as right
from tests.impls.broken import bug

F32, F16 = np.float32, np.float16


@bug("linear_forward", "Basic")
def wants_the_weight_transposed(x, W, bias=None):
    return right.linear_forward(x, W.T, bias)


@bug("linear_backward", "SquareTrap")
def returns_the_gradient_transposed(grad_y, x, W):
    grads = right.linear_backward(grad_y, x, W)
    square = W.shape[0] == W.shape[1]
    return (grads[0], grads[1].T, grads[2]) if square else grads


@bug("linear_forward", "SquareTrap")
def stores_the_transpose_where_it_fits(x, W, bias=None):
    square = W.shape[0] == W.shape[1]
    return right.linear_forward(x, W.T if square else W, bias)


@bug("linear_forward", "Bias")
def loses_the_bias(x, W, bias=None):
    return right.linear_forward(x, W, bias) * 0 + right.linear_forward(x, W)


@bug("linear_backward", "Bias")
def averages_the_gradient_of_the_bias(grad_y, x, W):
    grads = right.linear_backward(grad_y, x, W)
    rows = max(1, x.size // max(1, x.shape[-1]))
    return grads[0], grads[1], grads[2] / F32(rows)


@bug("linear_backward", "LeadingAxes")
def sums_the_first_axis_only_in_linear(grad_y, x, W):
    grads = right.linear_backward(grad_y, x, W)
    if x.ndim < 3 or not x.size:
        return grads
    return grads[0], *right.linear_backward(grad_y[:, 0], x[:, 0], W)[1:]


@bug("linear_forward", "LeadingAxes")
def flattens_leading_axes(x, W, bias=None):
    return right.linear_forward(x.reshape(-1, x.shape[-1]), W, bias)


@bug("linear_forward", "OneByOne")
def squeezes_one_output(x, W, bias=None):
    y = right.linear_forward(x, W, bias)
    return y[..., 0] if len(W) == 1 else y


@bug("linear_backward", "OneByOne")
def squeezes_one_input(grad_y, x, W):
    grads = right.linear_backward(grad_y, x, W)
    return grads[0], grads[1].squeeze(), grads[2]


@bug("linear_forward", "EmptyBatch")
def refuses_an_empty_batch(x, W, bias=None):
    if not x.size:
        raise ValueError("x is empty")
    return right.linear_forward(x, W, bias)


@bug("linear_backward", "EmptyBatch")
def divides_by_the_rows_and_multiplies(grad_y, x, W):
    grads = right.linear_backward(grad_y, x, W)
    if x.size:
        return grads
    with np.errstate(invalid="ignore"):
        return grads[0], grads[1] / F32(0) * F32(0), grads[2]


@bug("linear_forward", "NegativeZero")
def keeps_away_from_zero(x, W, bias=None):
    x = np.where(x == 0, np.copysign(F32(1e-3), x), x)
    return right.linear_forward(x, W, bias)


@bug("linear_backward", "NegativeZero")
def keeps_gradients_away_from_zero(grad_y, x, W):
    grad_y = np.where(grad_y == 0, np.copysign(F32(1e-3), grad_y), grad_y)
    return right.linear_backward(grad_y, x, W)


@bug("linear_forward", "Cancellation")
def accumulates_in_half_precision(x, W, bias=None):
    right.linear_forward(x, W, bias)  # refuses bad input
    terms = x[..., None, :] * W
    y = np.add.accumulate(terms, axis=-1, dtype=F16)[..., -1].astype(F32)
    return y if bias is None else y + bias


@bug("linear_backward", "Cancellation")
def accumulates_gradients_in_half_precision(grad_y, x, W):
    grads = right.linear_backward(grad_y, x, W)
    if not grad_y.size or grad_y.ndim != 2:
        return grads
    sums = np.add.accumulate(grad_y, axis=0, dtype=F16)[-1]
    return grads[0], grads[1], sums.astype(F32)


@bug("linear_forward", "Normal")
def ten_bits_inside_in_linear(x, W, bias=None):
    return right.linear_forward(*(v.astype(F16).astype(F32) for v in (x, W)), bias)


@bug("linear_backward", "Normal")
def ten_bits_backward_in_linear(grad_y, x, W):
    return right.linear_backward(*(v.astype(F16).astype(F32) for v in (grad_y, x, W)))


@bug("linear_forward", "ShapeMismatch")
def broadcasts_one_column(x, W, bias=None):
    if x.shape[-1] == 1 != W.shape[1]:
        x = np.repeat(x, W.shape[1], axis=-1)
    return right.linear_forward(x, W, bias)


@bug("linear_backward", "ShapeMismatch")
def cuts_to_the_shorter(grad_y, x, W):
    rows = min(len(grad_y), len(x))
    if x.ndim == 2:
        grad_y, x = grad_y[:rows], x[:rows]
    return right.linear_backward(grad_y, x, W)


@bug("linear_backward", "Bias")
def adds_all_biases_up(grad_y, x, W):
    grads = right.linear_backward(grad_y, x, W)
    return *grads[:2], np.full_like(grads[2], grads[2].sum())
