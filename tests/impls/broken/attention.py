"""Bugs of attention."""

import numpy as np

from minipeft.golden.drivers.reference import attention as right
from tests.impls.broken import bug

F32 = np.float32


def attend(Q, K, V, mask, low=-np.inf, shift=True):
    logits = Q @ K.swapaxes(-1, -2) / F32(np.sqrt(Q.shape[-1]))
    if mask is not None:
        logits = np.where(mask.astype(bool), logits, F32(low))
    with np.errstate(over="ignore", invalid="ignore"):
        E = np.exp(logits - (logits.max(axis=-1, keepdims=True) if shift else 0))
        return (E / E.sum(axis=-1, keepdims=True) @ V).astype(F32)


def large(Q, K):
    """Return whether exp overflows in float32."""
    return np.abs(Q @ K.swapaxes(-1, -2)).max() / np.sqrt(Q.shape[-1]) > 88


@bug("attention_forward", "Basic")
def divides_by_the_width(Q, K, V, mask=None):
    return right.attention_forward(Q / F32(np.sqrt(Q.shape[-1])), K, V, mask)


@bug("attention_backward", "Basic")
def divides_by_the_width_backward(grad_y, Q, K, V, mask=None):
    root = F32(np.sqrt(Q.shape[-1]))
    if large(Q, K):
        return right.attention_backward(grad_y, Q, K, V, mask)
    grad_Q, *rest = right.attention_backward(grad_y, Q / root, K, V, mask)
    return grad_Q / root, *rest


@bug("attention_forward", "EqualShares")
def adds_one_to_the_sum(Q, K, V, mask=None):
    y = right.attention_forward(Q, K, V, mask)
    return y if Q.any() else y * F32(K.shape[-2] / (K.shape[-2] + 1))


@bug("attention_forward", "OneKey")
def leaves_masked_keys_a_share(Q, K, V, mask=None):
    right.attention_forward(Q, K, V, mask)  # refuses bad input
    return attend(Q, K, V, mask, low=-10)


@bug("attention_forward", "BlindQuery")
def sees_everything_where_it_may_see_nothing(Q, K, V, mask=None):
    return attend(Q, K, V, mask, low=-1e30)


@bug("attention_forward", "BlindQuery", "query 2 of text 1 sees nothing")
def looks_at_the_first_mask_alone(Q, K, V, mask=None):
    if mask is None or mask.ndim < 3 or not mask[0].any(axis=-1).all():
        return right.attention_forward(Q, K, V, mask)
    blind = ~mask.any(axis=-1)
    return right.attention_forward(Q, K, V, mask | blind[..., None].astype(np.uint8))


@bug("attention_backward", "BlindQuery")
def gives_blind_queries_no_gradient(grad_y, Q, K, V, mask=None):
    if mask is None:
        return right.attention_backward(grad_y, Q, K, V)
    blind = ~mask.any(axis=-1)
    seen = mask | blind[..., None].astype(np.uint8)
    return right.attention_backward(grad_y * ~blind[..., None], Q, K, V, seen)


@bug(
    "attention_backward",
    "EqualShares",
    "2 keys, equal shares",
    "4 keys, equal shares",
)
def divides_by_a_little_more_backward(grad_y, Q, K, V, mask=None):
    grad_Q, *rest = right.attention_backward(grad_y, Q, K, V, mask)
    return grad_Q / F32(1 + 1e-5), *rest


@bug("attention_forward", "ShapeMismatch")
def spreads_one_value_over_all_keys(Q, K, V, mask=None):
    if len(V) == 1 < len(K):
        V = np.repeat(V, len(K), axis=0)
    return right.attention_forward(Q, K, V, mask)


@bug("attention_forward", "Causal")
def aligns_the_mask_at_the_first_key(Q, K, V, mask=None):
    right.attention_forward(Q, K, V, mask)
    if mask is not None and mask.shape[-2] < mask.shape[-1]:
        mask = np.tri(*mask.shape[-2:], dtype=np.uint8)
    return right.attention_forward(Q, K, V, mask)


@bug("attention_backward", "Causal")
def ignores_the_mask_backward(grad_y, Q, K, V, mask=None):
    return right.attention_backward(grad_y, Q, K, V)


@bug("attention_forward", "Batch")
def attends_to_the_first_text(Q, K, V, mask=None):
    if Q.ndim < 3:
        return right.attention_forward(Q, K, V, mask)
    K, V = np.broadcast_to(K[:1], K.shape), np.broadcast_to(V[:1], V.shape)
    return right.attention_forward(Q, K.copy(), V.copy(), mask)


@bug("attention_backward", "Batch")
def adds_gradients_over_the_batch(grad_y, Q, K, V, mask=None):
    grads = right.attention_backward(grad_y, Q, K, V, mask)
    if Q.ndim < 3:
        return grads
    return *grads[:2], np.broadcast_to(grads[2].sum(axis=0), V.shape).copy()


@bug("attention_forward", "LargeLogits")
def exponentiates_as_it_comes(Q, K, V, mask=None):
    right.attention_forward(Q, K, V, mask)
    return attend(Q, K, V, mask, shift=False)


@bug("attention_backward", "LargeLogits")
def exponentiates_as_it_comes_backward(grad_y, Q, K, V, mask=None):
    grads = right.attention_backward(grad_y, Q, K, V, mask)
    nan = F32(np.nan)  # infinity over infinity
    return tuple(np.full_like(g, nan) for g in grads) if large(Q, K) else grads


@bug("attention_forward", "BlindQuery")
def divides_no_share_by_no_share(Q, K, V, mask=None):
    return attend(Q, K, V, mask)


@bug("attention_forward", "OneKey", "the hidden keys have the largest logits")
def hides_keys_with_ten_thousand(Q, K, V, mask=None):
    if mask is None:
        return right.attention_forward(Q, K, V)
    right.attention_forward(Q, K, V, mask)
    logits = Q @ K.swapaxes(-1, -2) / F32(np.sqrt(Q.shape[-1]))
    logits = logits - F32(10000) * (mask == 0)
    E = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (E / E.sum(axis=-1, keepdims=True) @ V).astype(F32)


@bug("attention_forward", "LargeLogits", "the hidden keys have the largest logits")
def takes_off_the_largest_of_all(Q, K, V, mask=None):
    y = right.attention_forward(Q, K, V, mask)
    logits = Q @ K.swapaxes(-1, -2) / F32(np.sqrt(Q.shape[-1]))
    if mask is None:
        return y
    seen = np.where(mask != 0, logits, F32(-np.inf)).max(axis=-1)
    lost = np.exp(seen - logits.max(axis=-1)) == 0
    return np.where(lost[..., None], F32(np.nan), y)


@bug("attention_backward", "EqualShares", "2 keys of zeros", "4 keys of zeros")
def divides_by_a_little_more_for_the_keys(grad_y, Q, K, V, mask=None):
    grad_Q, grad_K, grad_V = right.attention_backward(grad_y, Q, K, V, mask)
    return grad_Q, grad_K / F32(1 + 1e-5), grad_V
