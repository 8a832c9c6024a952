"""Bugs of LoRA on experts."""

import numpy as np

from minipeft.golden.drivers.reference import experts as right
from tests.impls.broken import bug


@bug("experts_merge", "ExpertAxis")
def reads_both_as_expert_major(W, A, B, alpha, rank_stabilized):
    # In a file B is (out, r, experts); this code reads (out, experts, r).
    if B.ndim != 3 or not B.shape[2]:
        return right.experts_merge(W, A, B, alpha, rank_stabilized)
    experts, rows, r = B.shape
    flat = B.transpose(1, 2, 0).reshape(rows, experts * r)
    mixed = np.ascontiguousarray(flat.reshape(rows, experts, r).transpose(1, 0, 2))
    return right.experts_merge(W, A, mixed, alpha, rank_stabilized)


@bug("experts_forward", "Scaling")
def scales_by_alpha_in_experts(x, chosen, W, A, B, alpha, rank_stabilized, bias=None):
    r = max(A.shape[1], 1) if A.ndim == 3 else 1
    s = alpha * (np.sqrt(r) if rank_stabilized else r) + 1
    return right.experts_forward(x, chosen, W, A, B, s, rank_stabilized, bias)


@bug("experts_forward", "OutOfRange")
def wraps_the_experts(x, chosen, W, A, B, alpha, rank_stabilized, bias=None):
    wrapped = chosen % len(W)
    return right.experts_forward(x, wrapped, W, A, B, alpha, rank_stabilized, bias)


@bug("experts_forward", "ShapeMismatch")
def checks_nothing(x, chosen, W, A, B, alpha, rank_stabilized, bias=None):
    experts, rows, columns = W.shape
    if A.size % columns or B.size % rows or len(chosen) != len(x):
        raise ValueError("cannot broadcast")
    r = max(A.shape[-2], 1)
    s = alpha / np.sqrt(r) if rank_stabilized else alpha / r
    one, other = (np.broadcast_to(M, (experts, *M.shape[-2:])) for M in (A, B))
    y = W[chosen] @ x[..., None] + s * (other[chosen] @ (one[chosen] @ x[..., None]))
    biases = 0 if bias is None else np.broadcast_to(bias, (experts, rows))[chosen]
    return (y[..., 0] + biases).astype(np.float32)


@bug("experts_backward", "RepeatedExpert")
def keeps_the_last_token(grad_y, x, chosen, W, A, B, alpha, rank_stabilized):
    operands = (W, A, B, alpha, rank_stabilized)
    grad_x, grad_A, grad_B = right.experts_backward(grad_y, x, chosen, *operands)
    for e in set(chosen.reshape(-1).tolist()):
        last = np.flatnonzero(chosen.reshape(-1) == e)[-1:]
        tokens = (t.reshape(-1, t.shape[-1])[last] for t in (grad_y, x))
        _, one, other = right.experts_backward(
            *tokens, chosen.reshape(-1)[last], *operands
        )
        grad_A[e], grad_B[e] = one[e], other[e]
    return grad_x, grad_A, grad_B


@bug("experts_backward", "UnusedExpert")
def divides_by_the_tokens(grad_y, x, chosen, W, A, B, alpha, rank_stabilized):
    grad_x, grad_A, grad_B = right.experts_backward(
        grad_y, x, chosen, W, A, B, alpha, rank_stabilized
    )
    grad_A[np.setdiff1d(np.arange(len(W)), chosen)] = np.nan  # 0 / 0
    return grad_x, grad_A, grad_B


@bug("experts_merge", "ExpertAxis")
def guesses_the_layout_from_the_sizes(W, A, B, alpha, rank_stabilized):
    # A matrix with more columns than rows is taken as transposed, and then fits
    # nothing.
    merged = right.experts_merge(W, A, B, alpha, rank_stabilized)
    return W.copy() if W.shape[2] > W.shape[1] else merged
