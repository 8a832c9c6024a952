"""LoRA in the torch column, with autograd for the gradients."""

import torch
from torch import nn

from minipeft.golden.drivers.bridge import to_numpy, to_torch
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
    layer = LoRALinear(_linear(W, bias), _lora(W, A, B, alpha, rank_stabilized))
    return to_numpy(layer(to_torch(x)))


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
    adapter = _lora(W, A, B, alpha, rank_stabilized)
    leaf = to_torch(x).requires_grad_()
    y = LoRALinear(_linear(W), adapter)(leaf)
    gradients = torch.autograd.grad(y, (leaf, adapter.A, adapter.B), to_torch(grad_y))
    return to_numpy(gradients[0]), to_numpy(gradients[1]), to_numpy(gradients[2])


def lora_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """Return the weight of the merged layer."""
    layer = LoRALinear(_linear(W), _lora(W, A, B, alpha, rank_stabilized))
    return to_numpy(layer.merge().weight)


def _linear(W: Array, bias: Array | None = None) -> nn.Linear:
    out_features, in_features = W.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None)
    layer.weight = nn.Parameter(to_torch(W))
    if bias is not None:
        layer.bias = nn.Parameter(to_torch(bias))
    return layer


def _lora(W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool) -> LoRA:
    r = A.shape[0]
    lora.check_rank(r, W.shape[1], W.shape[0])
    s = lora.scaling(alpha, r, rank_stabilized)
    return LoRA(to_torch(A), to_torch(B), s)
