"""The error bound of a correct merge, derived and never tuned.

A merge in float32 sums r products and W, in any order, and rounds once to the dtype of
the weight. DoRA divides by a norm, whose squares are summed over in_features.
"""

import torch
from torch import Tensor

from minipeft.interop.update import Update, exact, read, row_norm
from minipeft.torch.dora import over_norm

ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
F32 = 2.0**-24


def gamma(n: int) -> float:
    """Relative error of n roundings in float32: n u / (1 - n u)."""
    return n * F32 / (1 - n * F32)


def allowed(W: Tensor, update: Update, wanted: Tensor) -> Tensor:
    """Return the largest error of a correct merge; `wanted` is exact, in float64.

    The merge under audit and our own merge are correct if both are within the bound.
    """
    wide = torch.float64
    size = read(W, update).to(wide).abs()
    absolute = update.B.to(wide).abs() @ update.A.to(wide).abs()
    size += abs(update.scaling) * absolute
    # r products, one sum with W, the scaling and its product.
    before = gamma(update.r + 3) * size
    if update.magnitude is not None:
        before = _dora(W, update, size)
    unit = ROUNDOFF[W.dtype]
    tiny = (
        torch.finfo(W.dtype).smallest_normal * unit
    )  # below it, floats are evenly spaced
    return before * (1 + unit) + unit * wanted.abs() + tiny


def _dora(W: Tensor, update: Update, size: Tensor) -> Tensor:
    """The bound for DoRA; terms of the squared norm may cancel: its condition."""
    wide = torch.float64
    V = exact(W, _lora(update), wide)
    norm = row_norm(V)
    assert update.magnitude is not None
    g = over_norm(update.magnitude.to(wide).abs(), norm)
    condition = over_norm((size * size).sum(dim=1), norm * norm).clamp(min=1)
    # The squared norm: in_features products, those of A A^T and of B, 2 r more; half
    # of its relative error, the root, the quotient and the product.
    roundings = V.shape[1] + 3 * update.r + 8
    return gamma(roundings) * (g * condition)[:, None] * size


def _lora(update: Update) -> Update:
    return Update(update.A, update.B, update.alpha, update.rank_stabilized)
