"""The linear layer under every adapter, and its gradients."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from minipeft.shapes import Shaped, check_shapes
from minipeft.values import check_kind

Input = Shaped[np.ndarray, "... in_features"]
Output = Shaped[np.ndarray, "... out_features"]
Weight = Shaped[np.ndarray, "out_features in_features"]
Bias = Shaped[np.ndarray, " out_features"]
AXES = {"x": "... in_features", "grad_y": "... out_features"}


class LinearGradients(NamedTuple):
    """Gradients of a loss with respect to the three operands of the layer."""

    x: Input
    W: Weight
    bias: Bias


def forward(x: Input, W: Weight, bias: Bias | None = None) -> Output:
    """Apply the layer: $y = x W^T + b$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    check_fits(W, {"x": x}, bias)
    y = x @ W.T
    return y if bias is None else y + bias


def backward(grad_y: Output, x: Input, W: Weight) -> LinearGradients:
    r"""Return the gradients of x, W and bias: $G W$, $G^T x$ and $\sum G$.

    $G = \partial L/\partial y$ is the gradient of the output. Every position of
    the leading axes adds its share to the gradients of W and bias.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    check_fits(W, {"x": x, "grad_y": grad_y})
    rows, G = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
    return LinearGradients(grad_y @ W, G.T @ rows, G.sum(axis=0))


def check_fits(
    W: Weight,
    given: Mapping[str, Shaped[np.ndarray, "..."]],
    bias: Shaped[np.ndarray, "..."] | None = None,
) -> None:
    """Refuse operands of another layer; NumPy would broadcast a bias of one number.

    Args:
        W: the weight.
        given: x, grad_y, or both, by name.
        bias: None if the layer has none.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    check_kind("given", given, Mapping)
    check_shapes(
        {
            "W": (W, "out_features in_features"),
            "bias": (bias, "? out_features"),
            **{name: (array, AXES[name]) for name, array in given.items()},
        }
    )
