"""The linear layer that every adapter builds on, and its gradient."""

from typing import NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.shapes import Shaped


class LinearGradients(NamedTuple):
    """Gradients of a loss with respect to what the layer was given."""

    x: Shaped[np.ndarray, "... in_features"]
    W: Shaped[np.ndarray, "out_features in_features"]
    bias: Shaped[np.ndarray, " out_features"]


def forward(
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
    bias: Shaped[np.ndarray, " out_features"] | None = None,
) -> Shaped[np.ndarray, "... out_features"]:
    """Apply the layer: $y = x W^T + b$."""
    y = x @ W.T
    return y if bias is None else y + bias


def backward(
    grad_y: Shaped[np.ndarray, "... out_features"],
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
) -> LinearGradients:
    r"""Return the gradients of x, W and bias: $G W$, $G^T x$ and $\sum G$.

    $G = \partial L/\partial y$ is the gradient of the output. Every position of
    the leading axes adds its share to the gradients of W and bias.

    Raises:
        InputError: if x is not of this layer; no product below would notice.
    """
    if x.shape[-1] != W.shape[1]:
        raise InputError(
            f"x has {x.shape[-1]} features; W has shape {W.shape}, so give it the "
            f"{W.shape[1]} that the forward pass had."
        )
    rows, G = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    return LinearGradients(grad_y @ W, G.T @ rows, G.sum(axis=0))
