"""DoRA in the torch column, with autograd for the gradients."""

import torch

from minipeft.errors import InputError
from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import frozen
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
    layer = DoRALinear(frozen(W, bias), _dora(W, A, B, magnitude, alpha))
    return to_numpy(layer(to_torch(x)))


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
    adapter, leaf = _dora(W, A, B, magnitude, alpha), to_torch(x).requires_grad_()
    y = DoRALinear(frozen(W), adapter)(leaf)
    trained = (leaf, adapter.A, adapter.B, adapter.magnitude)
    gradients = torch.autograd.grad(y, trained, to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def dora_merge(W: Array, A: Array, B: Array, magnitude: Array, alpha: float) -> Array:
    """Return the weight of the merged layer."""
    layer = DoRALinear(frozen(W), _dora(W, A, B, magnitude, alpha))
    return to_numpy(layer.merge().weight)


def _dora(W: Array, A: Array, B: Array, magnitude: Array, alpha: float) -> DoRA:
    r = A.shape[0]
    lora.check_rank(r, W.shape[1], W.shape[0])
    if magnitude.shape != W.shape[:1]:
        raise InputError(f"magnitude has shape {magnitude.shape}, not {W.shape[:1]}.")
    update = lora.LoRA(to_torch(A), to_torch(B), lora.scaling(alpha, r))
    return DoRA(update, to_torch(magnitude))
