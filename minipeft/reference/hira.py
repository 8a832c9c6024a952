"""HiRA: the frozen weight times a product of thin matrices, entry by entry."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from minipeft.reference import linear, lora
from minipeft.reference.linear import Bias, Input, Output, Weight
from minipeft.reference.lora import LoRA, LoRAGradients, MatrixA, MatrixB
from minipeft.values import check_kind, check_number


@dataclass(frozen=True)
class HiRA:
    """The trained factor of one weight: scaling * B A, multiplied entry by entry."""

    A: MatrixA
    B: MatrixB
    scaling: Any  # a float; a Fraction where a test computes over the rationals


def init(
    rng: np.random.Generator,
    in_features: int,
    out_features: int,
    r: int,
    scaling: float = 1.0,
) -> HiRA:
    r"""Start at zero update, as LoRA does: A random, B zero.

    Args:
        rng: the source of A.
        in_features: columns of W.
        out_features: rows of W.
        r: rank of B A, 1 to min(in_features, out_features); the update's is higher.
        scaling: the factor of the update, finite; the paper has 1.

    Raises:
        InputError: if r or the scaling is out of range.

    Source: HiRA (ICLR 2025, openreview TwJrTz9cRS), section 4.3.
    """
    check_number("scaling", scaling)
    new = lora.init(rng, in_features, out_features, r, alpha=r)
    return HiRA(new.A, new.B, scaling)


def delta(W: Weight, adapter: HiRA) -> Weight:
    r"""Return the update: $\Delta W = s\,W \odot B A$.

    The update depends on W: for another W, the same A and B give another update.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.

    Source: HiRA (ICLR 2025, openreview TwJrTz9cRS), equation 6.
    """
    check_fits(W, adapter)
    return adapter.scaling * (W * (adapter.B @ adapter.A))


def forward(x: Input, W: Weight, adapter: HiRA, bias: Bias | None = None) -> Output:
    r"""Apply the adapted layer: $y = x W^T + b + s\,x (W \odot B A)^T$.

    Two thin products cannot replace it, so a matrix of W's size is formed.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    dW = delta(W, adapter)
    return linear.forward(x, W, bias) + linear.forward(x, dW)


def backward(grad_y: Output, x: Input, W: Weight, adapter: HiRA) -> LoRAGradients:
    r"""Return the gradients of x, A and B; W is frozen and gets none.

    With $G = \partial L/\partial y$ and $M = s\,(G^T x) \odot W$, the gradient of B A,
    they are $G (W + \Delta W)$, $B^T M$ and $M A^T$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    through = linear.backward(grad_y, x, delta(W, adapter))
    M = adapter.scaling * (through.W * W)
    return LoRAGradients(grad_y @ W + through.x, adapter.B.T @ M, M @ adapter.A.T)


def merge(W: Weight, adapter: HiRA) -> Weight:
    r"""Return the plain weight: $W' = W + s\,W \odot B A$.

    W cannot be computed back from W' by a subtraction of the update of W', so a
    layer that unmerges must keep W.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    return W + delta(W, adapter)


def check_fits(W: Weight, adapter: HiRA) -> None:
    """Refuse matrices of another layer; NumPy would broadcast a B of one row."""
    check_kind("the adapter", adapter, HiRA)
    lora.check_fits(W, LoRA(adapter.A, adapter.B, adapter.scaling))
