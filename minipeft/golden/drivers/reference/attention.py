"""One attention head in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import attention
from minipeft.reference.attention import Head


def attention_forward(Q: Array, K: Array, V: Array, mask: Array | None = None) -> Array:
    """Return the mixed values."""
    return attention.forward(_head(Q, K, V, mask))


def attention_backward(
    grad_y: Array, Q: Array, K: Array, V: Array, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return the gradients of Q, K and V."""
    grads = attention.backward(grad_y, _head(Q, K, V, mask))
    return grads.Q, grads.K, grads.V


def _head(Q: Array, K: Array, V: Array, mask: Array | None) -> Head:
    return Head(Q, K, V, None if mask is None else mask.astype(bool))
