"""Bottleneck adapters in the torch column, with autograd for the gradients."""

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch.bottleneck import Bottleneck


def bottleneck_forward(
    x: Array, down: Array, down_bias: Array, up: Array, up_bias: Array, scaling: float
) -> Array:
    """Return what the adapter adds."""
    return to_numpy(_adapter(down, down_bias, up, up_bias, scaling)(to_torch(x)))


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
    adapter = _adapter(down, down_bias, up, up_bias, scaling)
    leaf = to_torch(x).requires_grad_()
    trained = (adapter.down, adapter.down_bias, adapter.up, adapter.up_bias)
    gradients = torch.autograd.grad(adapter(leaf), (leaf, *trained), to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def _adapter(
    down: Array, down_bias: Array, up: Array, up_bias: Array, scaling: float
) -> Bottleneck:
    biases = to_torch(down_bias), to_torch(up_bias)
    return Bottleneck(to_torch(down), to_torch(up), scaling, *biases)
