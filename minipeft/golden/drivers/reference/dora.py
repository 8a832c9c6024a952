"""DoRA in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import dora, lora
from minipeft.reference.dora import DoRA


def dora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    magnitude: Array,
    alpha: float,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    return dora.forward(x, W, _dora(A, B, magnitude, alpha), bias)


def dora_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    magnitude: Array,
    alpha: float,
) -> tuple[Array, ...]:
    """Return the gradients of x, A, B and the magnitude."""
    return tuple(dora.backward(grad_y, x, W, _dora(A, B, magnitude, alpha)))


def dora_merge(W: Array, A: Array, B: Array, magnitude: Array, alpha: float) -> Array:
    """Return the merged weight in the dtype of W."""
    return dora.merge(W, _dora(A, B, magnitude, alpha)).astype(W.dtype)


def _dora(A: Array, B: Array, magnitude: Array, alpha: float) -> DoRA:
    return DoRA(A, B, lora.scaling(alpha, len(A)), magnitude)
