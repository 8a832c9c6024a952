"""Sums may be taken in any order: merging first, or summing backwards, passes.

The functions are written for this test; they share no code with a column.
"""

import numpy as np
import pytest

from minipeft.golden.implementations import Functions
from minipeft.golden.runner import verify
from minipeft.golden.vectors import load_all

F32 = np.float32


def scaling(A, alpha, rank_stabilized=False):
    r = len(A)
    if not r:
        raise ValueError("r is 0")
    return F32(alpha / (r**0.5 if rank_stabilized else r))


class Ordered:
    """All functions of the rows that multiply matrices, with one order of summation.

    backwards: sum from the last term to the first.

    late: multiply by the scaling after the sum, not before.
    """

    def __init__(self, backwards, late):
        self.backwards, self.late = backwards, late

    def dot(self, a, b):
        if a.shape[-1] != b.shape[0]:
            raise ValueError("the operands do not fit")
        terms = a[..., :, None] * b
        if self.backwards:
            terms = terms[..., ::-1, :]
        if not len(b):
            return np.zeros((*a.shape[:-1], b.shape[1]), a.dtype)
        return np.add.accumulate(terms, axis=-2)[..., -1, :]

    def scaled(self, s, a, b):
        return s * self.dot(a, b) if self.late else self.dot(s * a, b)

    # The merged weight, and one product with it.

    def lora_merge(self, W, A, B, alpha, rank_stabilized):
        s = scaling(A, alpha, rank_stabilized)
        update = self.scaled(s, B, A)
        return (W.astype(F32) + fitting(update, W)).astype(W.dtype)

    def lora_forward(self, x, W, A, B, alpha, rank_stabilized, bias=None):
        merged = self.lora_merge(W, A, B, alpha, rank_stabilized)
        return self.linear_forward(x, merged, bias)

    def lora_backward(self, grad_y, x, W, A, B, alpha, rank_stabilized):
        s = scaling(A, alpha, rank_stabilized)
        merged = self.lora_merge(W, A, B, alpha, rank_stabilized)
        grad_x, grad_V, _ = self.linear_backward(grad_y, x, merged)
        grad_A = self.scaled(s, np.ascontiguousarray(B.T), grad_V)
        return grad_x, grad_A, self.scaled(s, grad_V, np.ascontiguousarray(A.T))

    def linear_forward(self, x, W, bias=None):
        y = self.dot(x, W.T)
        return y if bias is None else y + fitting(bias, W[:, 0])

    def linear_backward(self, grad_y, x, W):
        if grad_y.shape[:-1] != x.shape[:-1] or x.shape[-1] != W.shape[1]:
            raise ValueError("the operands do not fit")
        G, rows = grad_y.reshape(-1, len(W)), x.reshape(-1, W.shape[1])
        ones = np.ones((1, len(G)), G.dtype)
        return self.dot(grad_y, W), self.dot(G.T, rows), self.dot(ones, G)[0]

    def ia3_merge(self, W, l, side):  # noqa: E741
        return W * (
            fitting(l, W[0]) if side == "input" else fitting(l, W[:, 0])[:, None]
        )

    def ia3_forward(self, x, W, l, side, bias=None):  # noqa: E741
        if side == "output" and bias is not None:
            bias = fitting(bias, W[:, 0]) * l
        return self.linear_forward(x, self.ia3_merge(W, l, side), bias)

    def vera_merge(self, W, A, B, d, b):
        out_features, in_features = W.shape
        if len(B) < out_features or A.shape[1] < in_features:
            raise ValueError("the pair is too small")
        A, B = A[:, :in_features], B[:out_features]
        update = self.dot(B, fitting(d, A[:, 0])[:, None] * A)
        return W + fitting(b, W[:, 0])[:, None] * update

    def vera_forward(self, x, W, A, B, d, b, bias=None):
        return self.linear_forward(x, self.vera_merge(W, A, B, d, b), bias)


def fitting(operand, like):
    if operand.shape != like.shape:
        raise ValueError(f"shape {operand.shape} does not fit {like.shape}")
    return operand


@pytest.mark.parametrize("row", ["linear", "lora", "ia3", "vera"])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_any_order_passes(row, backwards, late):
    found = Ordered(backwards, late)
    ordered = Functions("ordered", lambda name: getattr(found, name, None))
    outcomes = list(verify(ordered, load_all([row])))
    failed = [(o.file, o.case.tcId, o.detail) for o in outcomes if o.status == "fail"]
    assert failed == []
    assert sum(o.status == "pass" for o in outcomes) >= 25
