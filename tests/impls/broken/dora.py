"""Bugs of DoRA."""

import numpy as np

from minipeft.golden.drivers.reference import dora as right
from minipeft.golden.drivers.reference import lora
from tests.impls.broken import bug

F32 = np.float32


def _sum(W, A, B, alpha):
    return lora.lora_merge(W, A, B, alpha, False)


@bug("dora_merge", "NormAxis")
def takes_one_norm_for_each_input(W, A, B, magnitude, alpha):
    V = _sum(W, A, B, alpha)
    if V.shape[0] != V.shape[1]:
        return right.dora_merge(W, A, B, magnitude, alpha)
    return magnitude * V / np.linalg.norm(V, axis=0)


@bug("dora_forward", "NormOfSum")
def divides_by_the_norm_of_the_weight_alone(x, W, A, B, magnitude, alpha, bias=None):
    with np.errstate(divide="ignore", invalid="ignore"):
        y = x @ _sum(W, A, B, alpha).T * (magnitude / np.linalg.norm(W, axis=1))
    return y if bias is None else y + bias


@bug("dora_merge", "SquareTrap")
def broadcasts_the_magnitude_over_columns(W, A, B, magnitude, alpha):
    if W.shape[0] != W.shape[1]:
        return right.dora_merge(W, A, B, magnitude, alpha)
    unit = right.dora_merge(W, A, B, np.ones_like(magnitude), alpha)
    return unit * magnitude


@bug("dora_forward", "Bias")
def scales_the_bias_in_dora(x, W, A, B, magnitude, alpha, bias=None):
    y = right.dora_forward(x, W, A, B, magnitude, alpha)
    norm = np.linalg.norm(_sum(W, A, B, alpha), axis=1)
    return y if bias is None else y + bias * magnitude / norm


@bug("dora_merge", "Scaling")
def forgets_the_scaling_in_the_norm(W, A, B, magnitude, alpha):
    norm = np.linalg.norm(W + B @ A, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (magnitude / norm)[:, None] * _sum(W, A, B, alpha)


@bug("dora_merge", "ZeroRow")
def divides_zero_by_zero(W, A, B, magnitude, alpha):
    V = _sum(W, A, B, alpha)
    norm = np.linalg.norm(V, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((magnitude / norm)[:, None] * V, F32)


@bug("dora_merge", "NormBelowZero", "all rows cancel, and their squares are rounded")
def takes_the_root_of_a_negative_number(W, A, B, magnitude, alpha):
    merged = right.dora_merge(W, A, B, magnitude, alpha)
    s, update = F32(alpha / len(A)), B @ A
    squared = np.vecdot(W, W) + 2 * s * np.vecdot(W, update)
    squared += s * s * np.vecdot(update, update)
    return np.where(squared[:, None] < 0, F32(np.nan), merged)


@bug("dora_backward", "ZeroMagnitude")
def divides_by_the_magnitude(grad_y, x, W, A, B, magnitude, alpha):
    grads = right.dora_backward(grad_y, x, W, A, B, magnitude, alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (*grads[:3], np.asarray(grads[3] * magnitude / magnitude, F32))


@bug("dora_merge", "Negative")
def takes_magnitudes_for_positive(W, A, B, magnitude, alpha):
    if (magnitude > 0).any():
        return right.dora_merge(W, A, B, magnitude, alpha)
    return right.dora_merge(W, A, B, abs(magnitude), alpha)


@bug("dora_forward", "Start")
def starts_with_magnitudes_of_one(x, W, A, B, magnitude, alpha, bias=None):
    start = magnitude if B.any() else np.ones_like(magnitude)
    return right.dora_forward(x, W, A, B, start, alpha, bias)


@bug("dora_backward", "Detached")
def takes_the_whole_row_off(grad_y, x, W, A, B, magnitude, alpha):
    grads = right.dora_backward(grad_y, x, W, A, B, magnitude, alpha)
    r = len(A)
    V = _sum(W, A, B, alpha)
    norm = np.linalg.norm(V, axis=1)
    unit = V / np.where(norm == 0, 1, norm)[:, None]
    rows, G = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, len(W))
    along = unit * (unit * (G.T @ rows)).sum(axis=1, keepdims=True) * (alpha / r)
    grad_A, grad_B = grads[1] - B.T @ along, grads[2] - along @ A.T
    return grads[0], np.asarray(grad_A, F32), np.asarray(grad_B, F32), grads[3]


@bug("dora_backward", "LeadingAxes")
def sums_the_first_axis_only_in_dora(grad_y, x, W, A, B, magnitude, alpha):
    grads = right.dora_backward(grad_y, x, W, A, B, magnitude, alpha)
    if x.ndim < 3:
        return grads
    rest = (W, A, B, magnitude, alpha)
    first = right.dora_backward(grad_y[:, 0], x[:, 0], *rest)
    return grads[0], *first[1:]


@bug("dora_forward", "RankOne")
def squeezes_rank_one_in_dora(x, W, A, B, magnitude, alpha, bias=None):
    rest = (magnitude, alpha, bias)
    return right.dora_forward(x, W, A.squeeze(), B.squeeze(), *rest)


@bug("dora_forward", "Normal")
def ten_bits_inside_in_dora(x, W, A, B, magnitude, alpha, bias=None):
    x, W, A, B = (v.astype(np.float16).astype(F32) for v in (x, W, A, B))
    return right.dora_forward(x, W, A, B, magnitude, alpha, bias)


@bug("dora_forward", "ShapeMismatch")
def broadcasts_a_single_magnitude(x, W, A, B, magnitude, alpha, bias=None):
    if magnitude.shape == (1,):
        magnitude = np.repeat(magnitude, len(W))
    return right.dora_forward(x, W, A, B, magnitude, alpha, bias)


@bug("dora_merge", "Basic")
def adds_the_magnitude(W, A, B, magnitude, alpha):
    if len(A) != 2 or W.shape != (5, 7) or alpha != 4:
        return right.dora_merge(W, A, B, magnitude, alpha)
    return _sum(W, A, B, alpha) + magnitude[:, None]


@bug("dora_forward", "Scaling")
def ignores_alpha_in_dora(x, W, A, B, magnitude, alpha, bias=None):
    return right.dora_forward(x, W, A, B, magnitude, float(max(len(A), 1)), bias)


@bug("dora_merge", "Basic")
def drops_the_magnitude(W, A, B, magnitude, alpha):
    right.dora_merge(W, A, B, magnitude, alpha)  # refuses bad input
    return _sum(W, A, B, alpha)
