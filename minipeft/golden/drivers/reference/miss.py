"""MiSS in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import miss
from minipeft.reference.miss import MiSS


def miss_forward(x: Array, W: Array, D: Array, bias: Array | None = None) -> Array:
    """Return the output of the adapted layer."""
    return miss.forward(x, W, MiSS(D), bias)


def miss_backward(grad_y: Array, x: Array, W: Array, D: Array) -> tuple[Array, ...]:
    """Return the gradients of x and D."""
    return tuple(miss.backward(grad_y, x, W, MiSS(D)))


def miss_merge(W: Array, D: Array) -> Array:
    """Return the merged weight."""
    return miss.merge(W, MiSS(D))
