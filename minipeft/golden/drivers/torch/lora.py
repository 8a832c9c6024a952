"""LoRA in the torch column, with autograd for the gradients."""

from typing import Any

import numpy as np
import torch
from torch import nn

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import layer
from minipeft.golden.tensors import Array
from minipeft.torch import lora
from minipeft.torch.linear import frozen
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


def lora_weighted_sum(
    A: Array,
    B: Array,
    other_A: Array,
    other_B: Array,
    alpha: float,
    other_alpha: float,
    weight: float,
    other_weight: float,
) -> Array:
    """Return the update of a layer with both adapters, each times its weight."""
    base = to_torch(np.zeros((B.shape[0], A.shape[1]), np.float32))
    adapted = LoRALinear(frozen(base), _lora(A, B, alpha))
    adapted.add("other", _lora(other_A, other_B, other_alpha))
    adapted.activate({"default": weight, "other": other_weight})
    return to_numpy(adapted.delta())


def lora_merge_tied(
    E: Array, A: Array, B: Array, alpha: float, layer: str
) -> tuple[Array, Array]:
    """Return the two weights, untied first: a tied layer takes no adapter."""
    shared = to_torch(E)
    embedding: Any = nn.Embedding(*E.shape)
    embedding.weight = nn.Parameter(shared)
    layers: dict[str, Any] = {"embedding": embedding, "head": frozen(shared.clone())}
    adapter = _lora(A, B, alpha)
    if layer == "embedding":  # which keeps the transpose of what it multiplies by
        A_turned, B_turned = (M.detach().T.contiguous() for M in (adapter.B, adapter.A))
        adapter = LoRA(A_turned, B_turned, adapter.scaling)
    layers[layer] = LoRALinear(layers[layer], adapter).merge().unload()
    return to_numpy(layers["embedding"].weight), to_numpy(layers["head"].weight)


def _lora(A: Array, B: Array, alpha: float, rank_stabilized: bool = False) -> LoRA:
    s = lora.scaling(alpha, len(A), rank_stabilized)
    return LoRA(to_torch(A), to_torch(B), s)
