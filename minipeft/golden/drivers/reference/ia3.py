"""IA3 in the NumPy column."""

from minipeft.errors import InputError
from minipeft.golden.tensors import Array
from minipeft.reference import ia3
from minipeft.reference.ia3 import IA3


def ia3_forward(
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: str,
    bias: Array | None = None,
) -> Array:
    """Return the output of the rescaled layer."""
    return ia3.forward(x, W, _ia3(W, l, side), bias)


def ia3_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: str,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """Return the gradients of x and l."""
    gradients = ia3.backward(grad_y, x, W, _ia3(W, l, side), bias)
    return gradients.x, gradients.l


def ia3_merge(W: Array, l: Array, side: str) -> Array:  # noqa: E741
    """Return the merged weight."""
    return ia3.merge(W, _ia3(W, l, side))


def _ia3(W: Array, l: Array, side: str) -> IA3:  # noqa: E741
    features = W.shape[1 if side == "input" else 0]
    if l.shape != (features,):
        raise InputError(f"l has shape {l.shape}; this side of W needs ({features},).")
    return IA3(l, side == "input")
