"""LoRA: a frozen weight plus a trained product of two thin matrices."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.shapes import Shaped


@dataclass(frozen=True)
class LoRA:
    """The update of one weight: scaling * B A."""

    A: Shaped[np.ndarray, "r in_features"]
    B: Shaped[np.ndarray, "out_features r"]
    scaling: Any  # a float; a Fraction where a test computes over the rationals


class LoRAGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the two trained matrices."""

    x: Shaped[np.ndarray, "... in_features"]
    A: Shaped[np.ndarray, "r in_features"]
    B: Shaped[np.ndarray, "out_features r"]


def scaling(alpha: float, r: int, rank_stabilized: bool = False) -> float:
    r"""Return $\alpha / r$, or rsLoRA's $\alpha / \sqrt r$.

    With $\alpha / \sqrt r$ the update and its gradient keep their size as r grows.

    Source: LoRA (arXiv:2106.09685), section 4.1; rsLoRA (arXiv:2312.03732),
    theorem 3.2.
    """
    return alpha / sqrt(r) if rank_stabilized else alpha / r


def init(
    rng: np.random.Generator,
    in_features: int,
    out_features: int,
    r: int,
    alpha: float,
    rank_stabilized: bool = False,
) -> LoRA:
    r"""Start at zero update: A random, B zero.

    $A \sim U(-1/\sqrt{k}, 1/\sqrt{k})$ with k = in_features, the Kaiming-uniform choice
    of every implementation in use (the paper writes a Gaussian); $B = 0$.

    Args:
        rng: the source of A.
        in_features: columns of W.
        out_features: rows of W.
        r: rank of the update, 1 to min(in_features, out_features).
        alpha: numerator of the scaling.
        rank_stabilized: divide by sqrt(r) instead of r.

    Raises:
        InputError: if r is out of range.

    Source: LoRA (arXiv:2106.09685), section 4.1.
    """
    check_rank(r, in_features, out_features)
    bound = 1 / sqrt(in_features)
    A = rng.uniform(-bound, bound, (r, in_features)).astype(np.float32)
    B = np.zeros((out_features, r), np.float32)
    return LoRA(A, B, scaling(alpha, r, rank_stabilized))


def delta(lora: LoRA) -> Shaped[np.ndarray, "out_features in_features"]:
    r"""Return the update itself: $\Delta W = s B A$."""
    return lora.scaling * (lora.B @ lora.A)


def forward(
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
    lora: LoRA,
    bias: Shaped[np.ndarray, " out_features"] | None = None,
) -> Shaped[np.ndarray, "... out_features"]:
    """Apply the adapted layer: $y = x W^T + b + s (x A^T) B^T$.

    The update is never formed: two thin products cost O((in + out) r) a row.

    Source: LoRA (arXiv:2106.09685), equation 3.
    """
    check_fits(W, lora)
    return linear.forward(x, W, bias) + lora.scaling * ((x @ lora.A.T) @ lora.B.T)


def backward(
    grad_y: Shaped[np.ndarray, "... out_features"],
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
    lora: LoRA,
) -> LoRAGradients:
    r"""Return the gradients of x, A and B; W is frozen and gets none.

    With $G = \partial L/\partial y$ and $h = x A^T$, they are $G W + s\,(G B) A$,
    $s\,(G B)^T x$ and $s\,G^T h$.
    """
    check_fits(W, lora)
    up = linear.backward(lora.scaling * grad_y, x @ lora.A.T, lora.B)
    down = linear.backward(up.x, x, lora.A)
    return LoRAGradients(grad_y @ W + down.x, down.W, up.W)


def merge(
    W: Shaped[np.ndarray, "out_features in_features"], lora: LoRA
) -> Shaped[np.ndarray, "out_features in_features"]:
    r"""Return the weight of the plain layer that does the same: $W' = W + s B A$."""
    check_fits(W, lora)
    return W + delta(lora)


def check_rank(r: int, in_features: int, out_features: int) -> None:
    """Refuse a rank that no update of this weight can have."""
    if not 1 <= r <= min(in_features, out_features):
        raise InputError(
            f"r is {r}; choose 1 to {min(in_features, out_features)} for a weight of "
            f"shape ({out_features}, {in_features})."
        )


def check_fits(W: Shaped[np.ndarray, "out_features in_features"], lora: LoRA) -> None:
    """Refuse matrices of another layer: one row of B would broadcast in silence."""
    r = len(lora.A)
    if lora.A.shape != (r, W.shape[1]) or lora.B.shape != (W.shape[0], r):
        raise InputError(
            f"A has shape {lora.A.shape} and B {lora.B.shape}; for a weight of shape "
            f"{W.shape} they must be (r, {W.shape[1]}) and ({W.shape[0]}, r)."
        )
