"""MiSS: one small trained matrix that all shards of the input share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.reference.linear import Bias, Input, Output, Weight
from minipeft.shapes import Operand, Shaped, check_shapes
from minipeft.values import check_integer, check_kind

MatrixD = Shaped[np.ndarray, "r out_features"]
Folded = Shaped[np.ndarray, "... r"]


@dataclass(frozen=True)
class MiSS:
    """The trained matrix D, added to each shard of r neighbouring columns of W."""

    D: MatrixD


class MiSSGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the trained matrix."""

    x: Input
    D: MatrixD


def init(in_features: int, out_features: int, r: int) -> MiSS:
    """Start at zero update: D is zero, but its gradient is not.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        r: rows of D, 1 to in_features; the last shard is short if r does not divide
            in_features.

    Raises:
        InputError: if r is out of range.

    Source: MiSS (arXiv:2409.15371), section 4.2.
    """
    check_integer("in_features", in_features, 1)
    check_integer("out_features", out_features, 0)
    check_integer("r", r)
    if not 1 <= r <= in_features:
        raise InputError(f"r is {r}; choose 1 to {in_features}, the inputs of W.")
    return MiSS(np.zeros((r, out_features), np.float32))


def delta(adapter: MiSS, in_features: int) -> Weight:
    r"""Return the update: $\Delta W_{oi} = D_{i \bmod r,\,o}$.

    Raises:
        InputError: if D is no matrix, or empty.

    Source: MiSS (arXiv:2409.15371), section 4.2.
    """
    _check_parts(adapter, {})
    check_integer("in_features", in_features, 0)
    return adapter.D[np.arange(in_features) % len(adapter.D)].T.copy()


def forward(x: Input, W: Weight, adapter: MiSS, bias: Bias | None = None) -> Output:
    r"""Apply the adapted layer: $y = x W^T + b + \mathrm{fold}(x) D$.

    The update is never formed: the shards of x are added, then multiplied by D.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    _check_fits(W, adapter)
    return linear.forward(x, W, bias) + fold(x, len(adapter.D)) @ adapter.D


def backward(grad_y: Output, x: Input, W: Weight, adapter: MiSS) -> MiSSGradients:
    r"""Return the gradients of x and D; W is frozen and gets none.

    With $G = \partial L/\partial y$: $G (W + \Delta W)$ and $\mathrm{fold}(x)^T G$,
    summed over all positions.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    _check_fits(W, adapter)
    linear.check_fits(W, {"x": x, "grad_y": grad_y})
    thin = linear.backward(grad_y, fold(x, len(adapter.D)), adapter.D.T)
    spread = np.arange(W.shape[1]) % len(adapter.D)
    return MiSSGradients(grad_y @ W + thin.x[..., spread], thin.W.T)


def merge(W: Weight, adapter: MiSS) -> Weight:
    r"""Return the plain weight: $W'_{oi} = W_{oi} + D_{i \bmod r,\,o}$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    _check_fits(W, adapter)
    return W + delta(adapter, W.shape[1])


def fold(x: Input, r: int) -> Folded:
    r"""Add the shards of x, r numbers each: $\sum_{i \bmod r = j} x_i$ for each j.

    Raises:
        InputError: if r is below 1, or x has no float dtype.
    """
    check_shapes({"x": (x, "... in_features")})
    check_integer("r", r, 1)
    # Zeros fill the last shard.
    missing = np.zeros((*x.shape[:-1], -x.shape[-1] % r), x.dtype)
    full = np.concatenate([x, missing], axis=-1)
    return full.reshape(*x.shape[:-1], -1, r).sum(axis=-2)


def _check_fits(W: Weight, adapter: MiSS) -> None:
    """Refuse a matrix of another layer; NumPy would broadcast a single column."""
    _check_parts(adapter, {"W": (W, "out_features in_features")})


def _check_parts(
    adapter: MiSS, beside: Mapping[str, tuple[Operand | None, str]]
) -> None:
    check_kind("the adapter", adapter, MiSS)
    check_shapes({**beside, "D": (adapter.D, "r out_features")})
    if not len(adapter.D):
        raise InputError("r is 0; give D at least one row.")
