"""One attention head in the torch column, with autograd for the gradients."""

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch import attention
from minipeft.torch.attention import Head


def attention_forward(Q: Array, K: Array, V: Array, mask: Array | None = None) -> Array:
    """Return the mixed values."""
    return to_numpy(attention.forward(_head(Q, K, V, mask)))


def attention_backward(
    grad_y: Array, Q: Array, K: Array, V: Array, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """Return the gradients of Q, K and V."""
    head = _head(Q, K, V, mask)
    leaves = [t.requires_grad_() for t in (head.Q, head.K, head.V)]
    y = attention.forward(head)
    grad_Q, grad_K, grad_V = torch.autograd.grad(y, leaves, to_torch(grad_y))
    return to_numpy(grad_Q), to_numpy(grad_K), to_numpy(grad_V)


def _head(Q: Array, K: Array, V: Array, mask: Array | None) -> Head:
    seen = None if mask is None else to_torch(mask).bool()
    return Head(to_torch(Q), to_torch(K), to_torch(V), seen)
