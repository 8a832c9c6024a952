"""IA3: a trained vector that rescales keys, values, or the feed-forward layer."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.reference.linear import Bias, Input, Output, Weight
from minipeft.shapes import Shaped, check_shapes
from minipeft.values import check_integer, check_kind

Side = Literal["output", "input"]
Vector = Shaped[np.ndarray, " features"]


@dataclass(frozen=True)
class IA3:
    """The trained vector l, and the side of the layer that l scales.

    Keys and values: l has out_features numbers and scales the output of the layer.
    Feed-forward: l has in_features numbers and scales the input of the layer behind the
    nonlinearity.
    """

    l: Vector  # noqa: E741  # the paper's name
    side: Side

    def __post_init__(self) -> None:
        """Refuse a side that is neither `output` nor `input`."""
        if self.side not in get_args(Side):
            raise InputError(f"side is {self.side!r}; choose 'output' or 'input'.")


class IA3Gradients(NamedTuple):
    """Gradients of a loss with respect to the input and the vector."""

    x: Input
    l: Vector  # noqa: E741


def init(features: int, side: Side = "output") -> IA3:
    """Start without a change: every number of l is 1.

    Args:
        features: of the side that l scales.
        side: `output` for keys and values, `input` for feed-forward.

    Raises:
        InputError: if the side is neither `output` nor `input`.

    Source: IA3 (arXiv:2205.05638), section 3.3.
    """
    check_integer("features", features, 0)
    return IA3(np.ones(features, np.float32), side)


def forward(x: Input, W: Weight, adapter: IA3, bias: Bias | None = None) -> Output:
    r"""Apply the rescaled layer.

    Output: $y = l \odot (x W^T + b)$, and the bias is scaled too.
    Input: $y = (l \odot x) W^T + b$, and the bias is not scaled.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.

    Source: IA3 (arXiv:2205.05638), section 3.3.
    """
    _check_fits(W, adapter)
    linear.check_fits(W, {"x": x}, bias)
    if adapter.side == "input":
        return linear.forward(adapter.l * x, W, bias)
    return adapter.l * linear.forward(x, W, bias)


def backward(
    grad_y: Output, x: Input, W: Weight, adapter: IA3, bias: Bias | None = None
) -> IA3Gradients:
    r"""Return the gradients of x and l; W and the bias are frozen.

    Output: $(l \odot G) W$ and $\sum G \odot (x W^T + b)$.
    Input: $l \odot (G W)$ and $\sum x \odot (G W)$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    _check_fits(W, adapter)
    linear.check_fits(W, {"x": x, "grad_y": grad_y}, bias)
    if adapter.side == "input":
        scaled = grad_y @ W
        return IA3Gradients(adapter.l * scaled, _over_positions(x * scaled))
    scaled = grad_y * linear.forward(x, W, bias)
    return IA3Gradients((adapter.l * grad_y) @ W, _over_positions(scaled))


def merge(W: Weight, adapter: IA3) -> Weight:
    r"""Return the weight of the plain layer: $W' = \Lambda_l W$ or $W \Lambda_l$.

    If l scales the output, the bias changes as well: see `merge_bias`. Where l is 0,
    no division gives W back, so a layer that unmerges must keep W.

    Raises:
        InputError: if l is not as long as its side of W.
    """
    _check_fits(W, adapter)
    return W * adapter.l if adapter.side == "input" else adapter.l[:, np.newaxis] * W


def merge_bias(bias: Bias, adapter: IA3) -> Bias:
    r"""Return the bias of the plain layer: $l \odot b$ for the output, else $b$.

    Raises:
        InputError: if l scales the output and the bias has another length.
    """
    check_kind("the adapter", adapter, IA3)
    side = "in_features" if adapter.side == "input" else "out_features"
    check_shapes({"l": (adapter.l, side), "bias": (bias, "out_features")})
    if adapter.side == "input":
        return bias.copy()
    return adapter.l * bias


def _check_fits(W: Weight, adapter: IA3) -> None:
    """Refuse a vector for another layer, or for the other side of this layer."""
    check_kind("the adapter", adapter, IA3)
    side = "in_features" if adapter.side == "input" else "out_features"
    check_shapes({"W": (W, "out_features in_features"), "l": (adapter.l, side)})


def _over_positions(values: Shaped[np.ndarray, "... features"]) -> Vector:
    """Sum over every axis but the last."""
    return values.reshape(-1, values.shape[-1]).sum(axis=0)
