"""LoRA in the torch column, with autograd for the gradients."""

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import layer
from minipeft.golden.tensors import Array
from minipeft.torch import lora
from minipeft.torch.lora import LoRA, LoRALinear


def lora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    adapted = LoRALinear(layer(W, bias), _lora(A, B, alpha, rank_stabilized))
    return to_numpy(adapted(to_torch(x)))


def lora_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, A and B."""
    adapter = _lora(A, B, alpha, rank_stabilized)
    leaf = to_torch(x).requires_grad_()
    y = LoRALinear(layer(W), adapter)(leaf)
    gradients = torch.autograd.grad(y, (leaf, adapter.A, adapter.B), to_torch(grad_y))
    return to_numpy(gradients[0]), to_numpy(gradients[1]), to_numpy(gradients[2])


def lora_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """Return the weight of the merged layer."""
    adapted = LoRALinear(layer(W), _lora(A, B, alpha, rank_stabilized))
    return to_numpy(adapted.merge().weight)


def _lora(A: Array, B: Array, alpha: float, rank_stabilized: bool) -> LoRA:
    s = lora.scaling(alpha, len(A), rank_stabilized)
    return LoRA(to_torch(A), to_torch(B), s)
