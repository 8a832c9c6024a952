"""LoRA in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import lora
from minipeft.reference.lora import LoRA


def lora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    return lora.forward(x, W, _lora(A, B, alpha, rank_stabilized), bias)


def lora_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, A and B."""
    adapter = _lora(A, B, alpha, rank_stabilized)
    gradients = lora.backward(grad_y, x, W, adapter)
    return gradients.x, gradients.A, gradients.B


def lora_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """Return the merged weight in the dtype of W."""
    return lora.merge(W, _lora(A, B, alpha, rank_stabilized)).astype(W.dtype)


def _lora(A: Array, B: Array, alpha: float, rank_stabilized: bool) -> LoRA:
    return LoRA(A, B, lora.scaling(alpha, len(A), rank_stabilized))
