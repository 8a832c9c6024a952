"""Bugs of prefix tuning."""

import numpy as np

from minipeft.golden.drivers.reference import prefix as right
from tests.impls.broken import bug

F32 = np.float32


@bug("prefix_forward", "Basic")
def adds_the_prefix_to_the_keys(Q, K, V, P_K, P_V, mask=None):
    K = K.copy()
    n = min(len(P_K), K.shape[-2])
    K[..., :n, :] += P_K[..., :n, :]
    return right.prefix_forward(Q, K, V, P_K, P_V, mask)


@bug("prefix_forward", "EqualShares")
def counts_the_prefix_twice(Q, K, V, P_K, P_V, mask=None):
    if Q.any():
        return right.prefix_forward(Q, K, V, P_K, P_V, mask)
    P_K, P_V = (np.concatenate([P, P], axis=-2) for P in (P_K, P_V))
    return right.prefix_forward(Q, K, V, P_K, P_V, mask)


@bug("prefix_forward", "Causal")
def reads_the_prefix_forwards_too(Q, K, V, P_K, P_V, mask=None):
    if mask is None:
        return right.prefix_forward(Q, K, V, P_K, P_V)
    K, V = np.concatenate([P_K, K], axis=-2), np.concatenate([P_V, V], axis=-2)
    whole = np.tri(Q.shape[-2], K.shape[-2], dtype=np.uint8)
    return right.prefix_forward(Q, K, V, P_K[..., :0, :], P_V[..., :0, :], whole)


@bug("prefix_forward", "Batch")
def serves_the_first_text_only(Q, K, V, P_K, P_V, mask=None):
    y = right.prefix_forward(Q, K, V, P_K, P_V, mask)
    if Q.ndim < 3:
        return y
    none = P_K[..., :0, :], P_V[..., :0, :]
    bare = right.prefix_forward(Q[1:], K[1:], V[1:], *none, mask)
    return np.concatenate([y[:1], bare])


@bug("prefix_forward", "ShapeMismatch")
def spreads_one_value_over_the_prefix(Q, K, V, P_K, P_V, mask=None):
    if len(P_V) == 1 < len(P_K):
        P_V = np.repeat(P_V, len(P_K), axis=0)
    return right.prefix_forward(Q, K, V, P_K, P_V, mask)


@bug("prefix_expand", "Network")
def bends_with_relu(P, W_down, b_down, W_up, b_up):
    if len(P) == 1:
        return right.prefix_expand(P, W_down, b_down, W_up, b_up)
    hidden = np.maximum(P @ W_down.T + b_down, 0)
    flat = np.arctanh(np.clip(hidden, -0.9, 0.9)).astype(F32)
    eye, zero = np.eye(flat.shape[1], dtype=F32), np.zeros(flat.shape[1], F32)
    return right.prefix_expand(flat, eye, zero, W_up, b_up)


@bug("prefix_forward", "Batch", "one mask for each text")
def gives_all_texts_the_first_mask(Q, K, V, P_K, P_V, mask=None):
    if mask is not None and mask.ndim > 2:
        mask = mask[0]
    return right.prefix_forward(Q, K, V, P_K, P_V, mask)
