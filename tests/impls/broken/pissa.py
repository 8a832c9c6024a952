"""Bugs of PiSSA."""

import numpy as np

from minipeft.golden.drivers.reference import pissa as right
from tests.impls.broken import bug

F32 = np.float32


def split(W, r, keep):
    """Return the part of W in the singular directions `keep`, and the rest."""
    U, S, V = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    delta = ((U[:, keep] * S[keep]) @ V[keep]).astype(F32)
    return W - delta, delta


@bug("pissa_init", "Basic")
def takes_the_smallest_singular_values(W, r, alpha):
    right.pissa_init(W, r, alpha)  # refuses bad input
    return split(W, r, slice(-r, None))


@bug("pissa_init", "Scaling")
def forgets_the_scaling_in_the_base(W, r, alpha):
    base, delta = right.pissa_init(W, r, alpha)
    return base, delta * F32(alpha / r)


@bug("pissa_init", "FullRank")
def refuses_full_rank_in_pissa(W, r, alpha):
    if r == min(W.shape):
        raise ValueError("r must be smaller than W")
    return right.pissa_init(W, r, alpha)


@bug("pissa_init", "LowRank")
def divides_by_singular_values(W, r, alpha):
    base, delta = right.pissa_init(W, r, alpha)
    S = np.linalg.svd(W, compute_uv=False)
    if S[r - 1] > 1e-5 * S[0]:
        return base, delta
    return base, np.full_like(delta, np.nan)


@bug("pissa_init", "ExcessiveRank")
def cuts_the_rank_in_pissa(W, r, alpha):
    return right.pissa_init(W, min(max(r, 1), *W.shape), alpha)


@bug("pissa_init", "ExcessiveRank", "r is 5, and W has 4 rows")
def compares_r_with_the_columns(W, r, alpha):
    if not len(W) < r <= W.shape[1]:
        return right.pissa_init(W, r, alpha)
    return right.pissa_init(W, len(W), alpha)


@bug(
    "pissa_init",
    "Normal",
    "normal values, 6 in, 9 out, r 2",
    "normal values, 11 in, 5 out, r 3",
)
def ten_bits_inside_in_pissa(W, r, alpha):
    right.pissa_init(W, r, alpha)  # refuses bad input
    return right.pissa_init(W.astype(np.float16).astype(F32), r, alpha)


@bug("pissa_to_lora", "ShapeMismatch")
def spreads_one_row_over_a(A, B, A_0, B_0):
    if len(A) == 1 < B.shape[1]:
        A = np.repeat(A, B.shape[1], axis=0)
    return right.pissa_to_lora(A, B, A_0, B_0)


@bug("pissa_init", "InvalidAlpha")
def takes_any_alpha(W, r, alpha):
    return right.pissa_init(W, r, alpha if alpha > 0 else 1)


@bug("pissa_init", "NotFinite")
def replaces_what_is_not_finite_in_pissa(W, r, alpha):
    return right.pissa_init(np.nan_to_num(W, posinf=0, neginf=0), r, alpha)


@bug("pissa_to_lora", "Conversion")
def adds_the_start_instead_of_taking_it_off(A, B, A_0, B_0):
    if len(A) == 1:
        return right.pissa_to_lora(A, B, A_0, B_0)
    return right.pissa_to_lora(A, B, A_0, -B_0)


@bug("pissa_to_lora", "Normal", "normal values")
def converts_in_half_precision(A, B, A_0, B_0):
    halves = (part.astype(np.float16) for part in (A, B, A_0, B_0))
    return tuple(part.astype(np.float32) for part in right.pissa_to_lora(*halves))
