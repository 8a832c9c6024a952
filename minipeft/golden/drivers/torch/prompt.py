"""Prompt tuning in the torch column, with autograd for the gradients."""

import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch import prompt
from minipeft.torch.prompt import Prompt


def prompt_init(E: Array, tokens: Array) -> Array:
    """Return the soft prompt that starts as these tokens."""
    return to_numpy(prompt.init(to_torch(E), to_torch(tokens).long()).P)


def prompt_forward(X: Array, P: Array) -> Array:
    """Return prompt and text."""
    return to_numpy(prompt.forward(to_torch(X), Prompt(to_torch(P))))


def prompt_backward(grad_y: Array, P: Array) -> tuple[Array, Array]:
    """Return the gradients of the text and of the prompt."""
    leaf = to_torch(P).requires_grad_()
    *batch, tokens, d = grad_y.shape
    X = leaf.new_zeros(*batch, tokens - len(P), d).requires_grad_()
    y = prompt.forward(X, Prompt(leaf))
    grad_X, grad_P = torch.autograd.grad(y, (X, leaf), to_torch(grad_y))
    return to_numpy(grad_X), to_numpy(grad_P)
