"""HiRA in the torch column, with autograd for the gradients."""

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import layer
from minipeft.golden.tensors import Array
from minipeft.torch.hira import HiRA, HiRALinear


def hira_forward(
    x: Array, W: Array, A: Array, B: Array, scaling: float, bias: Array | None = None
) -> Array:
    """Return the output of the adapted layer."""
    adapted = HiRALinear(layer(W, bias), _hira(A, B, scaling))
    return to_numpy(adapted(to_torch(x)))


def hira_backward(
    grad_y: Array, x: Array, W: Array, A: Array, B: Array, scaling: float
) -> tuple[Array, ...]:
    """Return the gradients of x, A and B."""
    adapter, leaf = _hira(A, B, scaling), to_torch(x).requires_grad_()
    y = HiRALinear(layer(W), adapter)(leaf)
    gradients = torch.autograd.grad(y, (leaf, adapter.A, adapter.B), to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def hira_merge(W: Array, A: Array, B: Array, scaling: float) -> Array:
    """Return the weight of the merged layer."""
    adapted = HiRALinear(layer(W), _hira(A, B, scaling))
    return to_numpy(adapted.merge().weight)


def _hira(A: Array, B: Array, scaling: float) -> HiRA:
    return HiRA(to_torch(A), to_torch(B), float(scaling))
