"""Bugs of LoRA for a mixed batch."""

import numpy as np

from minipeft.golden.drivers.reference import lora_batched as right
from tests.impls.broken import bug

F32 = np.float32
NONE = 255


def lacks(x, W, A, B, scaling, indices, bias=None):
    """Refuse what the right code refuses."""
    right.lora_batched_forward(x, W, A, B, scaling, indices, bias)


@bug("lora_batched_forward", "OwnAdapter")
def gives_all_the_adapter_of_the_first(x, W, A, B, scaling, indices, bias=None):
    lacks(x, W, A, B, scaling, indices, bias)
    same = np.full_like(indices, indices[0])
    return right.lora_batched_forward(x, W, A, B, scaling, same, bias)


@bug("lora_batched_forward", "OwnAdapter")
def takes_adapters_in_the_order_of_the_batch(x, W, A, B, scaling, indices, bias=None):
    lacks(x, W, A, B, scaling, indices, bias)
    order = np.arange(len(indices), dtype=np.uint8) % len(A)
    return right.lora_batched_forward(x, W, A, B, scaling, order, bias)


@bug("lora_batched_forward", "Basic")
def forgets_the_scaling_of_each(x, W, A, B, scaling, indices, bias=None):
    ones = np.ones_like(scaling)
    return right.lora_batched_forward(x, W, A, B, ones, indices, bias)


@bug("lora_batched_forward", "NoAdapter")
def counts_none_from_the_end(x, W, A, B, scaling, indices, bias=None):
    last = np.where(indices == NONE, len(A) - 1, indices).astype(np.uint8)
    return right.lora_batched_forward(x, W, A, B, scaling, last, bias)


@bug("lora_batched_forward", "OutOfRange", "adapter 3 of 3 is asked for")
def takes_an_unknown_adapter_for_none(x, W, A, B, scaling, indices, bias=None):
    known = np.where(indices < len(A), indices, NONE).astype(np.uint8)
    return right.lora_batched_forward(x, W, A, B, scaling, known, bias)


@bug("lora_batched_forward", "LeadingAxes")
def deals_the_rows_out_in_turn(x, W, A, B, scaling, indices, bias=None):
    y = right.lora_batched_forward(x, W, A, B, scaling, indices, bias)
    if x.ndim < 3 or len(x) < 2:
        return y
    rows = x.reshape(-1, 1, x.shape[-1])
    turns = np.resize(indices, len(rows))
    out = right.lora_batched_forward(rows, W, A, B, scaling, turns, bias)
    return out.reshape(y.shape)


@bug("lora_batched_forward", "Bias")
def adds_the_bias_to_adapted_rows_alone(x, W, A, B, scaling, indices, bias=None):
    y = right.lora_batched_forward(x, W, A, B, scaling, indices, bias)
    if bias is not None:
        y[indices == NONE] -= bias
    return y


@bug("lora_batched_forward", "SquareTrap", "square weight and updates")
def exchanges_the_matrices_of_a_square(x, W, A, B, scaling, indices, bias=None):
    if A.shape[1:] == B.shape[1:] and len(A) == len(B):
        A, B = (np.ascontiguousarray(M.swapaxes(1, 2)) for M in (B, A))
    return right.lora_batched_forward(x, W, A, B, scaling, indices, bias)


@bug("lora_batched_forward", "RankOne", "r 1")
def squeezes_the_rank_of_a_stack(x, W, A, B, scaling, indices, bias=None):
    if A.ndim == 3 and A.shape[1] == 1:
        A, B = A.squeeze(1), B.squeeze(2)
    return right.lora_batched_forward(x, W, A, B, scaling, indices, bias)


@bug("lora_batched_forward", "FilledUp", "the last columns of A and B are filled up")
def divides_by_the_rank_that_is_filled(x, W, A, B, scaling, indices, bias=None):
    lacks(x, W, A, B, scaling, indices, bias)
    ranks = A.any(axis=2).sum(axis=1)
    own = (scaling * ranks / max(A.shape[1], 1)).astype(F32)
    return right.lora_batched_forward(x, W, A, B, own, indices, bias)


@bug("lora_batched_forward", "Normal", "normal values, 7 in, 8 out, r 3")
def ten_bits_in_a_batch(x, W, A, B, scaling, indices, bias=None):
    x, W, A, B = (v.astype(np.float16).astype(F32) for v in (x, W, A, B))
    return right.lora_batched_forward(x, W, A, B, scaling, indices, bias)


@bug("lora_batched_forward", "ShapeMismatch", "scaling is of one adapter alone")
def spreads_one_scaling(x, W, A, B, scaling, indices, bias=None):
    if scaling.shape == (1,):
        scaling = np.repeat(scaling, len(A))
    return right.lora_batched_forward(x, W, A, B, scaling, indices, bias)


@bug("lora_batched_forward", "ZeroRank", "r is 0")
def takes_rank_zero_in_a_batch(x, W, A, B, scaling, indices, bias=None):
    if not A.shape[1]:
        return x @ W.T
    return right.lora_batched_forward(x, W, A, B, scaling, indices, bias)
