"""VeRA in the torch column, with autograd for the gradients."""

import torch

from minipeft.errors import InputError
from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import frozen
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
    layer = VeRALinear(frozen(W, bias), _vera(W, A, B, d, b))
    return to_numpy(layer(to_torch(x)))


def vera_backward(
    grad_y: Array, x: Array, W: Array, A: Array, B: Array, d: Array, b: Array
) -> tuple[Array, ...]:
    """Return the gradients of x, d and b."""
    adapter, leaf = _vera(W, A, B, d, b), to_torch(x).requires_grad_()
    y = VeRALinear(frozen(W), adapter)(leaf)
    gradients = torch.autograd.grad(y, (leaf, adapter.d, adapter.b), to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def vera_merge(W: Array, A: Array, B: Array, d: Array, b: Array) -> Array:
    """Return the weight of the merged layer."""
    layer = VeRALinear(frozen(W), _vera(W, A, B, d, b))
    return to_numpy(layer.merge().weight)


def _vera(W: Array, A: Array, B: Array, d: Array, b: Array) -> VeRA:
    if d.shape != A.shape[:1] or b.shape != W.shape[:1]:
        raise InputError(f"d and b have shapes {d.shape} and {b.shape}.")
    pair = Projections(0, len(A), A.shape[1], len(B))
    pair.A, pair.B = to_torch(A), to_torch(B)
    return VeRA(to_torch(d), to_torch(b), pair)
