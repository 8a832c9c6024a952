"""IA3 in the torch column, with autograd for the gradients."""

from typing import Any

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import layer
from minipeft.golden.tensors import Array
from minipeft.torch.ia3 import IA3, IA3Linear


def ia3_forward(
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: Any,
    bias: Array | None = None,
) -> Array:
    """Return the output of the rescaled layer."""
    adapted = IA3Linear(layer(W, bias), IA3(to_torch(l), side))
    return to_numpy(adapted(to_torch(x)))


def ia3_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: Any,
    bias: Array | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of x and l."""
    adapter, leaf = IA3(to_torch(l), side), to_torch(x).requires_grad_()
    y = IA3Linear(layer(W, bias), adapter)(leaf)
    gradients = torch.autograd.grad(y, (leaf, adapter.l), to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def ia3_merge(W: Array, l: Array, side: Any) -> Array:  # noqa: E741
    """Return the weight of the merged layer."""
    return to_numpy(IA3Linear(layer(W), IA3(to_torch(l), side)).merge().weight)
