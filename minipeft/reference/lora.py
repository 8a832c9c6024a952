"""LoRA: a frozen weight plus a trained product of two thin matrices."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.reference.linear import Bias, Input, Output, Weight
from minipeft.shapes import Operand, Shaped, check_scaling, check_shapes
from minipeft.values import check_flag, check_integer, check_kind, check_number

MatrixA = Shaped[np.ndarray, "r in_features"]
MatrixB = Shaped[np.ndarray, "out_features r"]


@dataclass(frozen=True)
class LoRA:
    """The update of one weight: scaling * B A."""

    A: MatrixA
    B: MatrixB
    scaling: Any  # a float; a Fraction where a test computes over the rationals


class LoRAGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the two trained matrices."""

    x: Input
    A: MatrixA
    B: MatrixB


class Tied(NamedTuple):
    """The weights of an embedding and of the head that shared its weight."""

    embedding: Weight
    head: Weight


def scaling(alpha: float, r: int, rank_stabilized: bool = False) -> float:
    r"""Return $\alpha / r$, or rsLoRA's $\alpha / \sqrt r$.

    With $\alpha / \sqrt r$, gradient descent keeps the update's size as r grows.

    Raises:
        InputError: if r is below 1, or alpha is not finite.

    Source: LoRA (arXiv:2106.09685), section 4.1; rsLoRA (arXiv:2312.03732),
    theorem 3.2.
    """
    check_integer("r", r, 1)
    check_number("alpha", alpha)
    check_flag("rank_stabilized", rank_stabilized)
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

    $A \sim U(-1/\sqrt{k}, 1/\sqrt{k})$ with k = in_features, the Kaiming-uniform
    default of loralib, peft and torchtune (the paper writes a Gaussian); $B = 0$.

    Args:
        rng: the source of A.
        in_features: columns of W.
        out_features: rows of W.
        r: rank of the update, 1 to min(in_features, out_features).
        alpha: numerator of the scaling, finite.
        rank_stabilized: divide by sqrt(r) instead of r.

    Raises:
        InputError: if r or alpha is out of range.

    Source: LoRA (arXiv:2106.09685), section 4.1.
    """
    check_rank(r, in_features, out_features)
    check_kind("rng", rng, np.random.Generator)
    s = scaling(alpha, r, rank_stabilized)
    bound = 1 / sqrt(in_features)
    A = rng.uniform(-bound, bound, (r, in_features)).astype(np.float32)
    B = np.zeros((out_features, r), np.float32)
    return LoRA(A, B, s)


def delta(adapter: LoRA) -> Weight:
    r"""Return the update: $\Delta W = s B A$.

    Raises:
        InputError: if A and B do not fit each other.
    """
    _check_parts(adapter, {})
    return adapter.scaling * (adapter.B @ adapter.A)


def forward(x: Input, W: Weight, adapter: LoRA, bias: Bias | None = None) -> Output:
    """Apply the adapted layer: $y = x W^T + b + s (x A^T) B^T$.

    The update is never formed: two thin products cost O((in + out) r) per row of x.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.

    Source: LoRA (arXiv:2106.09685), equation 3.
    """
    check_fits(W, adapter)
    A, B, s = adapter.A, adapter.B, adapter.scaling
    return linear.forward(x, W, bias) + s * ((x @ A.T) @ B.T)


def backward(grad_y: Output, x: Input, W: Weight, adapter: LoRA) -> LoRAGradients:
    r"""Return the gradients of x, A and B; W is frozen and gets none.

    With $G = \partial L/\partial y$ and $h = x A^T$, they are $G W + s\,(G B) A$,
    $s\,(G B)^T x$ and $s\,G^T h$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    check_fits(W, adapter)
    linear.check_fits(W, {"x": x, "grad_y": grad_y})
    up = linear.backward(adapter.scaling * grad_y, x @ adapter.A.T, adapter.B)
    down = linear.backward(up.x, x, adapter.A)
    return LoRAGradients(grad_y @ W + down.x, down.W, up.W)


def merge(W: Weight, adapter: LoRA) -> Weight:
    r"""Return the weight of a plain layer with the same output: $W' = W + s B A$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    check_fits(W, adapter)
    return W + delta(adapter)


def weighted_sum(one: LoRA, other: LoRA, weight: float, other_weight: float) -> LoRA:
    r"""Return one adapter for a sum of two: $w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2$.

    It is $[w_1 s_1 B_1, w_2 s_2 B_2] [A_1; A_2]$: the ranks add up, and no B meets the
    other adapter's A. A weight may be negative.

    Raises:
        InputError: if the adapters are of different layers, or a weight is not finite.
    """
    for adapter in (one, other):
        _check_parts(adapter, {})
    layer = {"A": (one.A, "r in_features"), "B": (one.B, "out_features r")}
    others = {"A": (other.A, "q in_features"), "B": (other.B, "out_features q")}
    check_shapes({**layer, **{f"the other {n}": about for n, about in others.items()}})
    check_number("weight", weight)
    check_number("other_weight", other_weight)
    A = np.concatenate([one.A, other.A])
    B = [weight * one.scaling * one.B, other_weight * other.scaling * other.B]
    return LoRA(A, np.concatenate(B, axis=1), 1)


def merge_tied(E: Weight, adapter: LoRA, layer: str) -> Tied:
    r"""Merge where the embedding E is the head's weight too: $E' = E + s B A$ for one.

    The layer without the adapter keeps E. So the two are two weights from now on.

    Args:
        E: (tokens, features); out_features of the head are the tokens.
        adapter: of one of the two layers.
        layer: `"embedding"` or `"head"`.

    Raises:
        InputError: as `merge`; if layer is neither.
    """
    if layer not in ("embedding", "head"):
        raise InputError(f"layer is {layer!r}; choose 'embedding' or 'head'.")
    check_shapes({"E": (E, "tokens features")})
    merged = merge(E, adapter)
    return Tied(merged, E.copy()) if layer == "embedding" else Tied(E.copy(), merged)


def check_rank(r: int, in_features: int, out_features: int) -> None:
    """Refuse a rank below 1, or above the rank that W can have."""
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        check_integer(name, value, 1)
    check_integer("r", r)
    if not 1 <= r <= min(in_features, out_features):
        raise InputError(
            f"r is {r}; choose 1 to {min(in_features, out_features)} for a weight of "
            f"shape ({out_features}, {in_features})."
        )


def check_fits(W: Weight, adapter: LoRA) -> None:
    """Refuse matrices of another layer; NumPy would broadcast a B of one row.

    A rank above the rank of W is allowed here: `pissa.to_lora` doubles the rank.
    """
    _check_parts(adapter, {"W": (W, "out_features in_features")})


def _check_parts(
    adapter: LoRA, beside: Mapping[str, tuple[Operand | None, str]]
) -> None:
    check_kind("the adapter", adapter, LoRA)
    A, B = (adapter.A, "r in_features"), (adapter.B, "out_features r")
    check_shapes({**beside, "A": A, "B": B})
    check_scaling(adapter.scaling, adapter.A)
    if not len(adapter.A):
        raise InputError("r is 0; give A at least one row and B at least one column.")
