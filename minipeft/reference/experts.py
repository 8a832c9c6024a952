"""LoRA on a stack of weights; each token uses the weights of its experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear, lora
from minipeft.shapes import (
    Integer,
    Operand,
    Shaped,
    check_array,
    check_scaling,
    check_shapes,
)
from minipeft.values import check_kind, check_sizes

Weights = Shaped[np.ndarray, "experts out_features in_features"]
Biases = Shaped[np.ndarray, "experts out_features"]
MatricesA = Shaped[np.ndarray, "experts r in_features"]
MatricesB = Shaped[np.ndarray, "experts out_features r"]
Input = Shaped[np.ndarray, "... in_features"]
Output = Shaped[np.ndarray, "... out_features"]
Chosen = Integer[np.ndarray, "..."]


@dataclass(frozen=True)
class ExpertsLoRA:
    """The updates of a stack of weights: scaling * B A, with one A and B per expert."""

    A: MatricesA
    B: MatricesB
    scaling: Any  # a float; a Fraction where a test computes over the rationals


class ExpertsGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the trained matrices."""

    x: Input
    A: MatricesA
    B: MatricesB


def init(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    r: int,
    alpha: float,
    rank_stabilized: bool = False,
) -> ExpertsLoRA:
    """Start every expert as LoRA starts: A random, B zero.

    Args:
        rng: the source of A, expert after expert.
        shape: of the stack, (experts, out_features, in_features).
        r: rank of each update, 1 to min(in_features, out_features).
        alpha: numerator of the scaling, finite.
        rank_stabilized: divide by sqrt(r) instead of r.

    Raises:
        InputError: if r or alpha is out of range.

    Source: LoRA (arXiv:2106.09685), section 4.1.
    """
    check_sizes("shape", shape, 3)
    experts, out_features, in_features = shape
    lora.check_rank(r, in_features, out_features)
    check_kind("rng", rng, np.random.Generator)
    s = lora.scaling(alpha, r, rank_stabilized)
    bound = 1 / sqrt(in_features)
    A = rng.uniform(-bound, bound, (experts, r, in_features)).astype(np.float32)
    B = np.zeros((experts, out_features, r), np.float32)
    return ExpertsLoRA(A, B, s)


def delta(adapter: ExpertsLoRA) -> Weights:
    r"""Return the updates: $\Delta W_e = s B_e A_e$.

    Raises:
        InputError: if A and B do not fit each other.
    """
    _check_parts(adapter, {})
    return adapter.scaling * (adapter.B @ adapter.A)


def forward(
    x: Input,
    chosen: Chosen,
    W: Weights,
    adapter: ExpertsLoRA,
    bias: Biases | None = None,
) -> Output:
    r"""Apply to each token its expert e: $y = W_e x + b_e + s B_e (A_e x)$.

    Args:
        x: the tokens.
        chosen: the expert of each token, 0 to experts - 1.
        W: the frozen weights.
        adapter: their updates.
        bias: one an expert.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype; if an
            expert is chosen that there is not.

    Source: LoRA (arXiv:2106.09685), equation 3, for each expert.
    """
    check_fits(W, adapter, bias)
    check_tokens(W, chosen, {"x": x})
    A, B, s = adapter.A[chosen], adapter.B[chosen], adapter.scaling
    column = x[..., None]
    y = (W[chosen] @ column + s * (B @ (A @ column)))[..., 0]
    return y if bias is None else y + bias[chosen]


def backward(
    grad_y: Output, x: Input, chosen: Chosen, W: Weights, adapter: ExpertsLoRA
) -> ExpertsGradients:
    r"""Return the gradients of x, A and B; W is frozen and gets none.

    A token with the gradient g gives $W_e^T g + s A_e^T B_e^T g$ to x, and adds
    $s (B_e^T g) x^T$ to the gradient of $A_e$ and $s\,g (A_e x)^T$ to that of $B_e$. An
    expert that no token chose gets zeros.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype; if an
            expert is chosen that there is not.
    """
    check_fits(W, adapter)
    check_tokens(W, chosen, {"x": x, "grad_y": grad_y})
    A, B = adapter.A[chosen], adapter.B[chosen]
    column, g = x[..., None], adapter.scaling * grad_y[..., None]
    up = B.swapaxes(-1, -2) @ g
    grad_A, grad_B = np.zeros_like(adapter.A), np.zeros_like(adapter.B)
    np.add.at(grad_A, chosen, up @ column.swapaxes(-1, -2))
    np.add.at(grad_B, chosen, g @ (A @ column).swapaxes(-1, -2))
    grad_x = W[chosen].swapaxes(-1, -2) @ grad_y[..., None] + A.swapaxes(-1, -2) @ up
    return ExpertsGradients(grad_x[..., 0], grad_A, grad_B)


def merge(W: Weights, adapter: ExpertsLoRA) -> Weights:
    r"""Return the stack that does the same without adapters: $W'_e = W_e + s B_e A_e$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    check_fits(W, adapter)
    return W + delta(adapter)


def check_fits(W: Weights, adapter: ExpertsLoRA, bias: Biases | None = None) -> None:
    """Refuse matrices of another stack; NumPy would broadcast a single expert."""
    W_and_bias = {
        "W": (W, "experts out_features in_features"),
        "bias": (bias, "? experts out_features"),
    }
    _check_parts(adapter, W_and_bias)


def _check_parts(
    adapter: ExpertsLoRA, beside: Mapping[str, tuple[Operand | None, str]]
) -> None:
    check_kind("the adapter", adapter, ExpertsLoRA)
    A, B = (adapter.A, "experts r in_features"), (adapter.B, "experts out_features r")
    check_shapes({**beside, "A": A, "B": B})
    check_scaling(adapter.scaling, adapter.A)
    if not adapter.A.shape[1]:
        raise InputError("r is 0; give A at least one row and B at least one column.")


def check_tokens(
    W: Weights, chosen: Chosen, given: Mapping[str, Shaped[np.ndarray, "..."]]
) -> None:
    """Refuse tokens of another layer, and numbers that name no expert.

    Args:
        W: the stack of weights.
        chosen: the expert of each token.
        given: x, and grad_y in the backward pass, by name.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype; if an
            expert is chosen that there is not.
    """
    check_kind("given", given, Mapping)
    check_shapes(
        {
            "W": (W, "experts out_features in_features"),
            **{name: (array, linear.AXES[name]) for name, array in given.items()},
        }
    )
    check_array("chosen", chosen, "whole numbers")
    tokens = given["x"].shape[:-1]
    if chosen.dtype.kind not in "iu" or chosen.shape != tokens:
        raise InputError(
            f"chosen has dtype {chosen.dtype} and shape {chosen.shape}; give one "
            f"integer a token, in shape {tokens}."
        )
    wrong = chosen[(chosen < 0) | (chosen >= len(W))]
    if wrong.size:
        raise InputError(
            f"expert {wrong[0]} is chosen; choose 0 to {len(W) - 1}, for the stack "
            f"holds {len(W)}."
        )
