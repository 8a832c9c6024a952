"""The layer that adapters wrap in the torch column, with autograd for its gradients."""

import torch
from torch import nn

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch.linear import layout


def linear_forward(x: Array, W: Array, bias: Array | None = None) -> Array:
    """Return the output of the layer."""
    layer = frozen(W, bias)
    return to_numpy(layout(layer).forward(layer, to_torch(x), layer.weight))


def linear_backward(grad_y: Array, x: Array, W: Array) -> tuple[Array, Array, Array]:
    """Return the gradients of x, W and a bias."""
    layer, leaf = frozen(W, W[:, 0]), to_torch(x).requires_grad_()
    y = layout(layer).forward(layer, leaf, layer.weight)
    trained = (leaf, layer.weight, layer.bias)
    gradients = torch.autograd.grad(y, trained, to_torch(grad_y))
    return to_numpy(gradients[0]), to_numpy(gradients[1]), to_numpy(gradients[2])


def frozen(W: Array, bias: Array | None = None) -> nn.Linear:
    """Return the linear layer of this weight and bias."""
    out_features, in_features = W.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(to_torch(W))
    if bias is not None:
        layer.bias = nn.Parameter(to_torch(bias))
    return layer
