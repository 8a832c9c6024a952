"""DoRA in the torch column, with autograd for the gradients."""

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import layer
from minipeft.golden.tensors import Array
from minipeft.torch import lora
from minipeft.torch.dora import DoRA, DoRALinear


def dora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    magnitude: Array,
    alpha: float,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    adapted = DoRALinear(layer(W, bias), _dora(A, B, magnitude, alpha))
    return to_numpy(adapted(to_torch(x)))


def dora_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    magnitude: Array,
    alpha: float,
) -> tuple[Array, ...]:
    """Return the gradients of x, A, B and the magnitude."""
    adapter, leaf = _dora(A, B, magnitude, alpha), to_torch(x).requires_grad_()
    y = DoRALinear(layer(W), adapter)(leaf)
    trained = (leaf, adapter.A, adapter.B, adapter.magnitude)
    gradients = torch.autograd.grad(y, trained, to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def dora_merge(W: Array, A: Array, B: Array, magnitude: Array, alpha: float) -> Array:
    """Return the weight of the merged layer."""
    adapted = DoRALinear(layer(W), _dora(A, B, magnitude, alpha))
    return to_numpy(adapted.merge().weight)


def _dora(A: Array, B: Array, magnitude: Array, alpha: float) -> DoRA:
    update = lora.LoRA(to_torch(A), to_torch(B), lora.scaling(alpha, len(A)))
    return DoRA(update, to_torch(magnitude))
