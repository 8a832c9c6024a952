"""Prompt tuning: trained vectors in place of the embeddings of a text."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.shapes import Integer, Shaped, check_array, check_shapes
from minipeft.values import check_integer, check_kind

Texts = Shaped[np.ndarray, "*batch tokens d"]
Vectors = Shaped[np.ndarray, "num_virtual_tokens d"]


@dataclass(frozen=True)
class Prompt:
    """The soft prompt: one vector for each virtual token."""

    P: Vectors


class PromptGradients(NamedTuple):
    """Gradients of a loss with respect to the embedded text and the soft prompt."""

    X: Texts
    P: Vectors


def init(
    E: Shaped[np.ndarray, "vocabulary d"], tokens: Integer[np.ndarray, " n"]
) -> Prompt:
    """Start from the embeddings of real tokens; the new prompt equals a text.

    Args:
        E: the model's embedding table.
        tokens: which rows to copy, at least one; repeat a short text to fill a length.

    Raises:
        InputError: if there is no token, a token is not in the vocabulary, or the
            tokens are no whole numbers.

    Source: Prompt tuning (arXiv:2104.08691), section 3.2.
    """
    check_shapes({"E": (E, "vocabulary d")})
    check_array("tokens", tokens, "whole numbers")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(
            f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; give whole "
            "numbers along one axis."
        )
    if not tokens.size:
        raise InputError("the soft prompt has no token; give at least one.")
    strange = tokens[(tokens < 0) | (tokens >= len(E))]
    if strange.size:
        raise InputError(
            f"token {strange[0]} is not in the vocabulary; choose 0 to {len(E) - 1}."
        )
    return Prompt(E[tokens])  # a copy: training must not change the table


def init_random(rng: np.random.Generator, num_virtual_tokens: int, d: int) -> Prompt:
    """Start from U(-0.5, 0.5), the simplest of the paper's three starts."""
    check_kind("rng", rng, np.random.Generator)
    check_integer("num_virtual_tokens", num_virtual_tokens, 1)
    check_integer("d", d, 1)
    return Prompt(rng.uniform(-0.5, 0.5, (num_virtual_tokens, d)).astype(np.float32))


def forward(X: Texts, prompt: Prompt) -> Shaped[np.ndarray, "*batch all_tokens d"]:
    """Put the prompt before every embedded text: $[P; X]$.

    Raises:
        InputError: if the prompt and the text have vectors of different lengths.

    Source: Prompt tuning (arXiv:2104.08691), section 2.
    """
    check_kind("the prompt", prompt, Prompt)
    check_shapes({"P": (prompt.P, "tokens d"), "X": (X, "... texts d")})
    P = np.broadcast_to(prompt.P, (*X.shape[:-2], *prompt.P.shape))
    return np.concatenate([P, X], axis=-2)


def backward(
    grad_y: Shaped[np.ndarray, "*batch all_tokens d"], prompt: Prompt
) -> PromptGradients:
    """Return the gradients; that of the shared prompt is a sum over the batch.

    Raises:
        InputError: if the gradient does not have the shape of [P; X].
    """
    check_kind("the prompt", prompt, Prompt)
    check_shapes({"P": (prompt.P, "tokens d"), "grad_y": (grad_y, "... all d")})
    n = len(prompt.P)
    if grad_y.shape[-2] < n:
        raise InputError(
            f"grad_y has {grad_y.shape[-2]} positions; the prompt alone has {n}: give "
            "the gradient of prompt and text."
        )
    own = grad_y[..., :n, :].reshape(-1, *prompt.P.shape)
    return PromptGradients(grad_y[..., n:, :].copy(), own.sum(axis=0))
