"""IA3 in the torch column, with autograd for the gradients."""

import torch

from minipeft.errors import InputError
from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import frozen
from minipeft.golden.tensors import Array
from minipeft.torch.ia3 import IA3, IA3Linear


def ia3_forward(
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: str,
    bias: Array | None = None,
) -> Array:
    """Return the output of the rescaled layer."""
    layer = IA3Linear(frozen(W, bias), _ia3(W, l, side))
    return to_numpy(layer(to_torch(x)))


def ia3_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: str,
    bias: Array | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of x and l."""
    adapter, leaf = _ia3(W, l, side), to_torch(x).requires_grad_()
    y = IA3Linear(frozen(W, bias), adapter)(leaf)
    gradients = torch.autograd.grad(y, (leaf, adapter.l), to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def ia3_merge(W: Array, l: Array, side: str) -> Array:  # noqa: E741
    """Return the weight of the merged layer."""
    return to_numpy(IA3Linear(frozen(W), _ia3(W, l, side)).merge().weight)


def _ia3(W: Array, l: Array, side: str) -> IA3:  # noqa: E741
    features = W.shape[1 if side == "input" else 0]
    if l.shape != (features,):
        raise InputError(f"l has shape {l.shape}; this side of W needs ({features},).")
    return IA3(to_torch(l), side == "input")
