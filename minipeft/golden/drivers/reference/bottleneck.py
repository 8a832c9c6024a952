"""Bottleneck adapters in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import bottleneck
from minipeft.reference.bottleneck import Bottleneck


def bottleneck_forward(
    x: Array, down: Array, down_bias: Array, up: Array, up_bias: Array, scaling: float
) -> Array:
    """Return what the adapter adds."""
    adapter = Bottleneck(down, down_bias, up, up_bias, scaling)
    return bottleneck.forward(x, adapter)


def bottleneck_backward(
    grad_y: Array,
    x: Array,
    down: Array,
    down_bias: Array,
    up: Array,
    up_bias: Array,
    scaling: float,
) -> tuple[Array, ...]:
    """Return the gradients of x, down, its bias, up, and its bias."""
    adapter = Bottleneck(down, down_bias, up, up_bias, scaling)
    return tuple(bottleneck.backward(grad_y, x, adapter))
