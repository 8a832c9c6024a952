"""The operations of an adapted layer of torch, for the drivers beside this file."""

from collections.abc import Callable
from typing import Any

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array

Arrays = tuple[Array, ...]
Functions = tuple[Callable[..., Any], ...]
Trained = Callable[[Any], list[torch.Tensor]]
Merged = Callable[[Any], torch.Tensor]


def lora(make: Callable[..., Any], trained: Trained, merged: Merged) -> Functions:
    """Return forward, backward and merge of the layers that `make` makes."""

    def forward(
        x: Array,
        W: Array,
        A: Array,
        B: Array,
        alpha: float,
        rank_stabilized: bool,
        bias: Array | None = None,
    ) -> Array:
        return to_numpy(make(W, A, B, alpha, rank_stabilized, bias)(to_torch(x)))

    def backward(
        grad_y: Array,
        x: Array,
        W: Array,
        A: Array,
        B: Array,
        alpha: float,
        rank_stabilized: bool,
    ) -> Arrays:
        return gradients(make(W, A, B, alpha, rank_stabilized), trained, grad_y, x)

    def merge(
        W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
    ) -> Array:
        return to_numpy(merged(make(W, A, B, alpha, rank_stabilized)))

    return forward, backward, merge


def dora(make: Callable[..., Any], trained: Trained, merged: Merged) -> Functions:
    """Return the same of layers with a magnitude."""

    def forward(
        x: Array,
        W: Array,
        A: Array,
        B: Array,
        magnitude: Array,
        alpha: float,
        bias: Array | None = None,
    ) -> Array:
        return to_numpy(make(W, A, B, alpha, False, bias, magnitude)(to_torch(x)))

    def backward(
        grad_y: Array,
        x: Array,
        W: Array,
        A: Array,
        B: Array,
        magnitude: Array,
        alpha: float,
    ) -> Arrays:
        layer = make(W, A, B, alpha, False, None, magnitude)
        return gradients(layer, trained, grad_y, x)

    def merge(W: Array, A: Array, B: Array, magnitude: Array, alpha: float) -> Array:
        return to_numpy(merged(make(W, A, B, alpha, False, None, magnitude)))

    return forward, backward, merge


def gradients(layer: Any, trained: Trained, grad_y: Array, x: Array) -> Arrays:
    """Return the gradients of x and of what is trained."""
    leaf = to_torch(x).clone().requires_grad_()
    found = torch.autograd.grad(layer(leaf), [leaf, *trained(layer)], to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in found)


def hold(module: torch.nn.Module, **arrays: Array | None) -> None:
    """Load parameters in the dtype that they come in; torch compares the shapes."""
    state = {k: to_torch(v.copy()) for k, v in arrays.items() if v is not None}
    torch.nn.Module.load_state_dict(module, state, strict=False, assign=True)
