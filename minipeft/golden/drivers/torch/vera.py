"""VeRA in the torch column, with autograd for the gradients."""

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import layer
from minipeft.golden.tensors import Array
from minipeft.torch import vera
from minipeft.torch.vera import Projections, VeRA, VeRALinear


def vera_projections(
    seed: int, r: int, in_features: int, out_features: int
) -> tuple[Array, Array]:
    """Return the shared pair."""
    A, B = vera.projections(seed, r, in_features, out_features)
    return to_numpy(A), to_numpy(B)


def vera_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    d: Array,
    b: Array,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    adapted = VeRALinear(layer(W, bias), _vera(A, B, d, b))
    return to_numpy(adapted(to_torch(x)))


def vera_backward(
    grad_y: Array, x: Array, W: Array, A: Array, B: Array, d: Array, b: Array
) -> tuple[Array, ...]:
    """Return the gradients of x, d and b."""
    adapter, leaf = _vera(A, B, d, b), to_torch(x).requires_grad_()
    y = VeRALinear(layer(W), adapter)(leaf)
    gradients = torch.autograd.grad(y, (leaf, adapter.d, adapter.b), to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def vera_merge(W: Array, A: Array, B: Array, d: Array, b: Array) -> Array:
    """Return the weight of the merged layer."""
    adapted = VeRALinear(layer(W), _vera(A, B, d, b))
    return to_numpy(adapted.merge().weight)


def _vera(A: Array, B: Array, d: Array, b: Array) -> VeRA:
    pair = Projections.given(to_torch(A), to_torch(B))
    return VeRA(to_torch(d), to_torch(b), pair)
