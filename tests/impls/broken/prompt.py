"""Bugs of prompt tuning."""

import numpy as np

from minipeft.golden.drivers.reference import prompt as right
from tests.impls.broken import bug


@bug("prompt_init", "RealTokens")
def starts_at_the_mean_of_its_tokens(E, tokens):
    P = right.prompt_init(E, tokens)
    return np.broadcast_to(P.mean(axis=0), P.shape).astype(P.dtype)


@bug("prompt_init", "OutOfRange")
def takes_the_last_token_for_an_unknown_one(E, tokens):
    return right.prompt_init(E, np.minimum(tokens, len(E) - 1))


@bug("prompt_init", "OutOfRange")
def takes_no_tokens_at_all(E, tokens):
    return E[:0] if not len(tokens) else right.prompt_init(E, tokens)


@bug("prompt_forward", "ShapeMismatch", "P has one column alone")
def spreads_one_column_of_the_prompt(X, P):
    if P.shape[1] == 1:
        P = np.repeat(P, X.shape[-1], axis=1)
    return right.prompt_forward(X, P)


@bug("prompt_backward", "ShapeMismatch", "grad_y is shorter than P")
def pads_a_short_gradient(grad_y, P):
    missing = max(0, len(P) - grad_y.shape[-2])
    pad = [(0, 0)] * (grad_y.ndim - 2) + [(0, missing), (0, 0)]
    return right.prompt_backward(np.pad(grad_y, pad), P)


@bug("prompt_forward", "Basic")
def stands_behind_the_text(X, P):
    if X.ndim > 2:
        return right.prompt_forward(X, P)
    return np.concatenate([X, P])


@bug("prompt_forward", "Batch")
def prompts_the_first_text_only(X, P):
    y = right.prompt_forward(X, P).copy()
    if X.ndim > 2:
        y.reshape(-1, *y.shape[-2:])[1:, : len(P)] = 0
    return y


@bug("prompt_backward", "Basic")
def reads_the_gradient_behind_the_text(grad_y, P):
    if grad_y.ndim > 2:
        return right.prompt_backward(grad_y, P)
    return grad_y[: -len(P)].copy(), grad_y[-len(P) :].copy()


@bug("prompt_backward", "Batch")
def takes_the_mean_over_the_batch(grad_y, P):
    grad_X, grad_P = right.prompt_backward(grad_y, P)
    texts = grad_y[..., 0, 0].size
    return grad_X, grad_P / np.float32(texts)


@bug("prompt_init", "RealTokens")
def starts_each_row_at_the_token_before(E, tokens):
    return np.roll(right.prompt_init(E, tokens), 1, axis=0)


@bug("prompt_forward", "NoText", "a text without tokens")
def returns_an_empty_text_as_it_is(X, P):
    return right.prompt_forward(X, P) if X.size else X.copy()


@bug("prompt_backward", "NoText", "a text without tokens")
def wants_a_text_behind_the_prompt(grad_y, P):
    if grad_y.shape[-2] <= len(P):
        raise ValueError("there is no text")
    return right.prompt_backward(grad_y, P)


@bug("prompt_backward", "Normal", "normal values")
def sums_over_the_batch_in_half_precision(grad_y, P):
    grad_X, grad_P = right.prompt_backward(grad_y, P)
    return grad_X, grad_P.astype(np.float16).astype(np.float32)
