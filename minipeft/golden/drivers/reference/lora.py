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


def lora_weighted_sum(
    A: Array,
    B: Array,
    other_A: Array,
    other_B: Array,
    alpha: float,
    other_alpha: float,
    weight: float,
    other_weight: float,
) -> Array:
    """Return the update of the sum."""
    one, other = _lora(A, B, alpha), _lora(other_A, other_B, other_alpha)
    return lora.delta(lora.weighted_sum(one, other, weight, other_weight))


def lora_merge_tied(
    E: Array, A: Array, B: Array, alpha: float, layer: str
) -> tuple[Array, Array]:
    """Return the two weights."""
    return lora.merge_tied(E, _lora(A, B, alpha), layer)


def _lora(A: Array, B: Array, alpha: float, rank_stabilized: bool = False) -> LoRA:
    return LoRA(A, B, lora.scaling(alpha, len(A), rank_stabilized))
