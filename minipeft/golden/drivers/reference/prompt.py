"""Prompt tuning in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import prompt
from minipeft.reference.prompt import Prompt


def prompt_init(E: Array, tokens: Array) -> Array:
    """Return the soft prompt that starts as these tokens."""
    return prompt.init(E, tokens).P


def prompt_forward(X: Array, P: Array) -> Array:
    """Return prompt and text."""
    return prompt.forward(X, Prompt(P))


def prompt_backward(grad_y: Array, P: Array) -> tuple[Array, Array]:
    """Return the gradients of the text and of the prompt."""
    grads = prompt.backward(grad_y, Prompt(P))
    return grads.X, grads.P
