"""The linear layer in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import linear


def linear_forward(x: Array, W: Array, bias: Array | None = None) -> Array:
    """Return the output of the layer."""
    return linear.forward(x, W, bias)


def linear_backward(grad_y: Array, x: Array, W: Array) -> tuple[Array, Array, Array]:
    """Return the gradients of x, W and bias."""
    gradients = linear.backward(grad_y, x, W)
    return gradients.x, gradients.W, gradients.bias
