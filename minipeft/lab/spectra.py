"""Compare weights before and after training by their singular values and vectors."""

import math

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.shapes import Inexact
from minipeft.values import checked


@checked
def rank_for(change: Inexact[Tensor, "out in"], share: float = 0.9) -> int:
    """Return the least k with σ₁² + … + σₖ² ≥ share · ‖ΔW‖².

    Args:
        change: ΔW = W − W₀, (out, in).
        share: of the squared norm, in (0, 1).

    Raises:
        InputError: the share lies outside (0, 1), or the change is zero or not finite.

    Source: Biderman and others 2024, the rank that explains 90 % of the variance.
    """
    if not 0 < share < 1:
        raise InputError(f"share is {share}; give a number between 0 and 1")
    total = float(change.double().square().sum())
    if not 0 < total < math.inf:
        raise InputError(
            f"the squared norm of the change is {total:g}; give a change of a weight "
            "that training has moved"
        )
    squares = torch.linalg.svdvals(change.double()).square()
    missing = torch.flip(torch.cumsum(torch.flip(squares, [0]), 0), [0])
    return max(1, int((missing > (1 - share) * total).sum()))


@checked
def similarities(
    before: Inexact[Tensor, "out in"],
    after: Inexact[Tensor, "rows columns"],
    count: int = 10,
) -> Inexact[Tensor, " k"]:
    """Return max_i |cos(y_j, x_i)| for the first singular vectors y_j of a weight.

    x_i are all left singular vectors of the weight before training.

    Args:
        before: W₀, (out, in).
        after: W, (out, in).
        count: k, of the vectors y_j with the largest singular values.

    Raises:
        InputError: the shapes differ; there are fewer than k singular vectors.

    Source: Shuttleworth and others 2024, algorithm 1.
    """
    if before.shape != after.shape:
        raise InputError(
            f"before has shape {tuple(before.shape)} and after {tuple(after.shape)}; "
            "give one layer's weight at two times"
        )
    if not 1 <= count <= min(before.shape):
        raise InputError(
            f"count is {count}; a weight of shape {tuple(before.shape)} has 1 to "
            f"{min(before.shape)} singular vectors"
        )
    old, new = (
        torch.linalg.svd(W.double(), full_matrices=False).U for W in (before, after)
    )
    best: Tensor = (old.T @ new[:, :count]).abs().amax(dim=0)
    return best


@checked
def intruders(similar: Inexact[Tensor, " k"], threshold: float = 0.5) -> int:
    """Return the intruder dimensions: the y_j with max_i |cos(y_j, x_i)| < ε.

    Args:
        similar: from `similarities`.
        threshold: ε, in (0, 1).

    Raises:
        InputError: the threshold lies outside (0, 1).

    Source: Shuttleworth and others 2024, definition 1.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold is {threshold}; give a number between 0 and 1")
    return int((similar < threshold).sum())
