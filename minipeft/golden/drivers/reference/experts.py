"""LoRA of experts in the NumPy column."""

import numpy as np

from minipeft.golden.tensors import Array
from minipeft.reference import experts, lora
from minipeft.reference.experts import ExpertsLoRA


def experts_forward(
    x: Array,
    chosen: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Array:
    """Return the output of each token's expert."""
    return experts.forward(x, chosen, W, _lora(A, B, alpha, rank_stabilized), bias)


def experts_backward(
    grad_y: Array,
    x: Array,
    chosen: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, A and B."""
    adapter = _lora(A, B, alpha, rank_stabilized)
    gradients = experts.backward(grad_y, x, chosen, W, adapter)
    return gradients.x, gradients.A, gradients.B


def experts_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """Return the merged stack in the dtype of W."""
    return experts.merge(W, _lora(A, B, alpha, rank_stabilized)).astype(W.dtype)


def _lora(A: Array, B: Array, alpha: float, rank_stabilized: bool) -> ExpertsLoRA:
    r = np.atleast_2d(A).shape[-2]
    return ExpertsLoRA(A, B, lora.scaling(alpha, r, rank_stabilized))
