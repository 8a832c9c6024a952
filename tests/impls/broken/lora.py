"""Bugs of LoRA."""

import numpy as np
from ml_dtypes import bfloat16

from minipeft.golden.drivers.reference import lora as right
from tests.impls.broken import bug

F32 = np.float32


@bug("lora_forward", "Scaling")
def scales_by_alpha(x, W, A, B, alpha, rank_stabilized, bias=None):
    r = np.sqrt(len(A)) if rank_stabilized else len(A)
    return right.lora_forward(x, W, A, B, alpha * r, rank_stabilized, bias)


@bug("lora_backward", "Scaling")
def forgets_the_scaling(grad_y, x, W, A, B, alpha, rank_stabilized):
    return right.lora_backward(grad_y, x, W, A, B, float(len(A)), False)


@bug("lora_merge", "RankStabilized")
def ignores_rank_stabilization(W, A, B, alpha, rank_stabilized):
    return right.lora_merge(W, A, B, alpha, False)


@bug("lora_merge", "SquareTrap")
def transposes_the_update(W, A, B, alpha, rank_stabilized):
    if W.shape[0] != W.shape[1]:
        return right.lora_merge(W, A, B, alpha, rank_stabilized)
    return right.lora_merge(W.T, A, B, alpha, rank_stabilized).T


@bug("lora_forward", "Orientation")
def wants_a_and_b_exchanged(x, W, A, B, alpha, rank_stabilized, bias=None):
    return right.lora_forward(x, W, B.T, A.T, alpha, rank_stabilized, bias)


@bug("lora_forward", "Bias")
def scales_the_bias(x, W, A, B, alpha, rank_stabilized, bias=None):
    scaled = None if bias is None else bias * F32(alpha / len(A))
    return right.lora_forward(x, W, A, B, alpha, rank_stabilized, scaled)


@bug("lora_backward", "LeadingAxes")
def sums_the_first_axis_only(grad_y, x, W, A, B, alpha, rank_stabilized):
    grads = right.lora_backward(grad_y, x, W, A, B, alpha, rank_stabilized)
    if x.ndim < 3:
        return grads
    first = right.lora_backward(grad_y[:, 0], x[:, 0], W, A, B, alpha, rank_stabilized)
    return grads[0], first[1], first[2]


@bug("lora_forward", "RankOne")
def squeezes_rank_one(x, W, A, B, alpha, rank_stabilized, bias=None):
    return right.lora_forward(
        x, W, A.squeeze(), B.squeeze(), alpha, rank_stabilized, bias
    )


@bug("lora_merge", "FullRank")
def refuses_full_rank(W, A, B, alpha, rank_stabilized):
    if len(A) >= min(W.shape):
        raise ValueError("r must be smaller than W")
    return right.lora_merge(W, A, B, alpha, rank_stabilized)


@bug("lora_backward", "Start")
def no_gradient_where_b_is_zero(grad_y, x, W, A, B, alpha, rank_stabilized):
    grads = right.lora_backward(grad_y, x, W, A, B, alpha, rank_stabilized)
    return (*grads[:2], grads[2] if B.any() else np.zeros_like(B))


@bug("lora_forward", "Normal")
def ten_bits_inside(x, W, A, B, alpha, rank_stabilized, bias=None):
    x, W, A, B = (v.astype(np.float16).astype(F32) for v in (x, W, A, B))
    return right.lora_forward(x, W, A, B, alpha, rank_stabilized, bias)


@bug("lora_merge", "MergeRounding")
def truncates_the_merged_weight(W, A, B, alpha, rank_stabilized):
    merged = right.lora_merge(W.astype(F32), A, B, alpha, rank_stabilized)
    if W.dtype == F32:
        return merged
    bits = 16 if W.dtype == bfloat16 else 13
    mask = np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)
    return (merged.view(np.uint32) & mask).view(F32).astype(W.dtype)


@bug("lora_forward", "ShapeMismatch")
def cuts_to_the_smaller_rank(x, W, A, B, alpha, rank_stabilized, bias=None):
    r = min(len(A), B.shape[1])
    return right.lora_forward(x, W, A[:r], B[:, :r], alpha, rank_stabilized, bias)


@bug("lora_merge", "ShapeMismatch", "A has one column alone")
def spreads_one_column_over_a(W, A, B, alpha, rank_stabilized):
    if A.shape[1] == 1:
        A = np.repeat(A, W.shape[1], axis=1)
    return right.lora_merge(W, A, B, alpha, rank_stabilized)


@bug("lora_merge", "ZeroRank")
def takes_rank_zero(W, A, B, alpha, rank_stabilized):
    return W.copy() if not len(A) else right.lora_merge(W, A, B, alpha, rank_stabilized)


@bug("lora_merge", "ExcessiveRank")
def cuts_the_rank(W, A, B, alpha, rank_stabilized):
    r = min(len(A), *W.shape)
    return right.lora_merge(W, A[:r], B[:, :r], alpha, rank_stabilized)


@bug("lora_merge", "Basic")
def overwrites_its_argument(W, A, B, alpha, rank_stabilized):
    W[...] = right.lora_merge(W, A, B, alpha, rank_stabilized)
    return W.copy()


@bug("lora_forward", "Scaling")
def takes_the_rank_for_alpha(x, W, A, B, alpha, rank_stabilized, bias=None):
    r = float(max(len(A), 1))
    return right.lora_forward(x, W, A, B, r, rank_stabilized, bias)


@bug("lora_merge", "Scaling")
def merges_without_scaling(W, A, B, alpha, rank_stabilized):
    return right.lora_merge(W, A, B, float(max(len(A), 1)), False)


@bug("lora_forward", "RankStabilized")
def serves_without_rank_stabilization(x, W, A, B, alpha, rank_stabilized, bias=None):
    return right.lora_forward(x, W, A, B, alpha, False, bias)


@bug("lora_merge", "Orientation")
def reads_both_factors_by_columns(W, A, B, alpha, rank_stabilized):
    A, B = (np.ascontiguousarray(M.reshape(M.shape[::-1]).T) for M in (A, B))
    return right.lora_merge(W, A, B, alpha, rank_stabilized)


@bug("lora_merge", "Basic")
def adds_the_update_twice(W, A, B, alpha, rank_stabilized):
    once = right.lora_merge(W, A, B, alpha, rank_stabilized)
    return right.lora_merge(once, A, B, alpha, rank_stabilized)


@bug(
    "lora_merge",
    "MergeRounding",
    "W is bfloat16, sums half way between two numbers",
)
def rounds_merged_halves_up(W, A, B, alpha, rank_stabilized):
    merged = right.lora_merge(W.astype(F32), A, B, alpha, rank_stabilized)
    if W.dtype != bfloat16:
        return right.lora_merge(W, A, B, alpha, rank_stabilized)
    up = merged.view(np.uint32) + np.uint32(1 << 15)
    return (up >> np.uint32(16) << np.uint32(16)).view(F32).astype(W.dtype)


@bug("lora_weighted_sum", "OwnMatrices")
def adds_the_matrices(A, B, other_A, other_B, alpha, other_alpha, weight, other_weight):
    parts = (A, B, other_A, other_B, alpha, other_alpha, weight, other_weight)
    delta = right.lora_weighted_sum(*parts)
    if A.shape != other_A.shape:
        return delta
    s = [weight * alpha / len(A), other_weight * other_alpha / len(A)]
    root = [np.sign(v) * abs(v) ** 0.5 for v in s]
    both = root[0] * B + root[1] * other_B
    return (both @ (np.abs(root[0]) * A + np.abs(root[1]) * other_A)).astype(F32)


@bug("lora_weighted_sum", "NegativeWeight")
def loses_the_sign_of_a_weight(
    A, B, other_A, other_B, alpha, other_alpha, weight, other_weight
):
    weights = abs(weight), abs(other_weight)
    return right.lora_weighted_sum(A, B, other_A, other_B, alpha, other_alpha, *weights)


@bug("lora_weighted_sum", "Weights")
def divides_by_the_sum_of_the_weights(
    A, B, other_A, other_B, alpha, other_alpha, weight, other_weight
):
    total = (weight + other_weight) or 1
    weights = weight / total, other_weight / total
    return right.lora_weighted_sum(A, B, other_A, other_B, alpha, other_alpha, *weights)


@bug("lora_weighted_sum", "OtherRank")
def scales_both_by_the_first_rank(
    A, B, other_A, other_B, alpha, other_alpha, weight, other_weight
):
    own = other_alpha * len(other_A) / max(len(A), 1)
    return right.lora_weighted_sum(
        A, B, other_A, other_B, alpha, own, weight, other_weight
    )


@bug("lora_merge_tied", "TiedHead")
def merges_into_the_shared_weight(E, A, B, alpha, layer):
    embedding, head = right.lora_merge_tied(E, A, B, alpha, layer)
    merged = head if layer == "head" else embedding
    return merged, merged.copy()


@bug("lora_merge_tied", "TiedHead")
def loses_the_head_when_tied_again(E, A, B, alpha, layer):
    embedding, _ = right.lora_merge_tied(E, A, B, alpha, layer)
    return embedding, embedding.copy()
