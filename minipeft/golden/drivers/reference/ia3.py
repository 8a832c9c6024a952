"""IA3 in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import ia3
from minipeft.reference.ia3 import IA3, Side


def ia3_forward(
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: Side,
    bias: Array | None = None,
) -> Array:
    """Return the output of the rescaled layer."""
    return ia3.forward(x, W, IA3(l, side), bias)


def ia3_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: Side,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """Return the gradients of x and l."""
    gradients = ia3.backward(grad_y, x, W, IA3(l, side), bias)
    return gradients.x, gradients.l


def ia3_merge(W: Array, l: Array, side: Side) -> Array:  # noqa: E741
    """Return the merged weight."""
    return ia3.merge(W, IA3(l, side))
