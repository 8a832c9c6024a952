"""IA3: one trained vector that rescales keys, values, or the feed-forward layer."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minipeft.reference import linear
from minipeft.shapes import Shaped


@dataclass(frozen=True)
class IA3:
    """The trained vector and the side of the layer that it scales.

    Keys and values: l has out_features numbers and scales the output. Feed-forward:
    l has in_features numbers and scales the input of the layer after the
    nonlinearity, which is the output of that nonlinearity.
    """

    l: Shaped[np.ndarray, " features"]  # noqa: E741  # the paper's name
    feedforward: bool


class IA3Gradients(NamedTuple):
    """Gradients of a loss with respect to the input and the vector."""

    x: Shaped[np.ndarray, "... in_features"]
    l: Shaped[np.ndarray, " features"]  # noqa: E741


def init(features: int, feedforward: bool = False) -> IA3:
    """Start at no change: every l is 1.

    Source: IA3 (arXiv:2205.05638), section 3.3.
    """
    return IA3(np.ones(features, np.float32), feedforward)


def forward(
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
    ia3: IA3,
    bias: Shaped[np.ndarray, " out_features"] | None = None,
) -> Shaped[np.ndarray, "... out_features"]:
    r"""Apply the rescaled layer.

    Keys and values: $y = l \odot (x W^T + b)$, and the bias is scaled with the rest.
    Feed-forward: $y = (l \odot x) W^T + b$, and it is not.

    Source: IA3 (arXiv:2205.05638), section 3.3.
    """
    if ia3.feedforward:
        return linear.forward(ia3.l * x, W, bias)
    return ia3.l * linear.forward(x, W, bias)


def backward(
    grad_y: Shaped[np.ndarray, "... out_features"],
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
    ia3: IA3,
    bias: Shaped[np.ndarray, " out_features"] | None = None,
) -> IA3Gradients:
    r"""Return the gradients of x and l; W and the bias are frozen.

    Keys and values: $(l \odot G) W$ and $\sum G \odot (x W^T + b)$. Feed-forward:
    $l \odot (G W)$ and $\sum x \odot (G W)$.
    """
    if ia3.feedforward:
        scaled = grad_y @ W
        return IA3Gradients(ia3.l * scaled, _over_positions(x * scaled))
    scaled = grad_y * linear.forward(x, W, bias)
    return IA3Gradients((ia3.l * grad_y) @ W, _over_positions(scaled))


def merge(
    W: Shaped[np.ndarray, "out_features in_features"], ia3: IA3
) -> Shaped[np.ndarray, "out_features in_features"]:
    r"""Return the weight of the plain layer: $W' = \Lambda_l W$ or $W \Lambda_l$.

    The bias of keys and values changes as well: see `merge_bias`. No division undoes
    a merge where l is 0, so whoever wants W back must keep it.
    """
    return W * ia3.l if ia3.feedforward else ia3.l[:, np.newaxis] * W


def merge_bias(
    bias: Shaped[np.ndarray, " out_features"], ia3: IA3
) -> Shaped[np.ndarray, " out_features"]:
    r"""Return the bias of the plain layer: $b' = l \odot b$, or b in feed-forward."""
    return bias if ia3.feedforward else ia3.l * bias


def _over_positions(
    values: Shaped[np.ndarray, "... features"],
) -> Shaped[np.ndarray, " features"]:
    """Sum over every axis but the last."""
    return values.reshape(-1, values.shape[-1]).sum(axis=0)
