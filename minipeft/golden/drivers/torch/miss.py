"""MiSS in the torch column, with autograd for the gradients."""

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import layer
from minipeft.golden.tensors import Array
from minipeft.torch.miss import MiSS, MiSSLinear


def miss_forward(x: Array, W: Array, D: Array, bias: Array | None = None) -> Array:
    """Return the output of the adapted layer."""
    adapted = MiSSLinear(layer(W, bias), MiSS(to_torch(D)))
    return to_numpy(adapted(to_torch(x)))


def miss_backward(grad_y: Array, x: Array, W: Array, D: Array) -> tuple[Array, ...]:
    """Return the gradients of x and D."""
    adapter, leaf = MiSS(to_torch(D)), to_torch(x).requires_grad_()
    y = MiSSLinear(layer(W), adapter)(leaf)
    gradients = torch.autograd.grad(y, (leaf, adapter.D), to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def miss_merge(W: Array, D: Array) -> Array:
    """Return the weight of the merged layer."""
    return to_numpy(MiSSLinear(layer(W), MiSS(to_torch(D))).merge().weight)
