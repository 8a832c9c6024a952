"""LoRA in the authors' own library. Packages: loralib==0.1.2 torch==2.13.0."""

import loralib
import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array


def lora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Array:
    """`loralib.Linear` while it trains."""
    return to_numpy(_layer(W, A, B, alpha, rank_stabilized, bias)(to_torch(x)))


def lora_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
) -> tuple[Array, ...]:
    """Its gradients."""
    layer = _layer(W, A, B, alpha, rank_stabilized)
    leaf = to_torch(x).clone().requires_grad_()
    leaves = [leaf, layer.lora_A, layer.lora_B]
    found = torch.autograd.grad(layer(leaf), leaves, to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in found)


def lora_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """The weight after `eval()`, which merges."""
    layer = _layer(W, A, B, alpha, rank_stabilized)
    layer.eval()  # returns None in loralib
    return to_numpy(layer.weight)


def _layer(
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> loralib.Linear:
    if rank_stabilized:
        raise NotImplementedError("loralib scales by alpha/r alone")
    out_features, in_features = W.shape
    layer = loralib.Linear(
        in_features, out_features, len(A), alpha, bias=bias is not None
    )
    layer = layer.to(to_torch(W).dtype)
    values = {"weight": W, "lora_A": A, "lora_B": B, "bias": bias}
    held = {name: to_torch(v.copy()) for name, v in values.items() if v is not None}
    layer.load_state_dict(held)
    return layer
