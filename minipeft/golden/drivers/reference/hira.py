"""HiRA in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import hira
from minipeft.reference.hira import HiRA


def hira_forward(
    x: Array, W: Array, A: Array, B: Array, scaling: float, bias: Array | None = None
) -> Array:
    """Return the output of the adapted layer."""
    return hira.forward(x, W, HiRA(A, B, scaling), bias)


def hira_backward(
    grad_y: Array, x: Array, W: Array, A: Array, B: Array, scaling: float
) -> tuple[Array, ...]:
    """Return the gradients of x, A and B."""
    return tuple(hira.backward(grad_y, x, W, HiRA(A, B, scaling)))


def hira_merge(W: Array, A: Array, B: Array, scaling: float) -> Array:
    """Return the merged weight."""
    return hira.merge(W, HiRA(A, B, scaling))
