"""DoRA in the NumPy column."""

from minipeft.errors import InputError
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
    return dora.forward(x, W, _dora(W, A, B, magnitude, alpha), bias)


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
    return tuple(dora.backward(grad_y, x, W, _dora(W, A, B, magnitude, alpha)))


def dora_merge(W: Array, A: Array, B: Array, magnitude: Array, alpha: float) -> Array:
    """Return the merged weight in the dtype of W."""
    return dora.merge(W, _dora(W, A, B, magnitude, alpha)).astype(W.dtype)


def _dora(W: Array, A: Array, B: Array, magnitude: Array, alpha: float) -> DoRA:
    lora.check_rank(A.shape[0], W.shape[1], W.shape[0])
    if magnitude.shape != W.shape[:1]:
        raise InputError(
            f"magnitude has shape {magnitude.shape}; give one length for each row, "
            f"shape {W.shape[:1]}."
        )
    return DoRA(A, B, lora.scaling(alpha, A.shape[0]), magnitude)
