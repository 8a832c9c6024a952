"""The layer that adapters wrap in the torch column, with autograd for its gradients."""

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch import linear


def linear_forward(x: Array, W: Array, bias: Array | None = None) -> Array:
    """Return the output of the layer."""
    return to_numpy(layer(W, bias)(to_torch(x)))


def linear_backward(grad_y: Array, x: Array, W: Array) -> tuple[Array, ...]:
    """Return the gradients of x, W and a bias."""
    trained, leaf = layer(W, W[:, 0]).requires_grad_(), to_torch(x).requires_grad_()
    wanted = (leaf, trained.weight, trained.bias)
    gradients = torch.autograd.grad(trained(leaf), wanted, to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def layer(W: Array, bias: Array | None = None) -> torch.nn.Linear:
    """Return the frozen layer of this weight and bias."""
    return linear.frozen(to_torch(W), None if bias is None else to_torch(bias))
