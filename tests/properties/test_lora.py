"""Laws of LoRA: over the rationals, in bits, and in derived bounds."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import linear, lora
from tests.strategies import (
    gaussian_layers,
    integer_layers,
    rational_layers,
    rationals,
    seeds,
    sizes,
)
from tests.tolerance import assert_bits, assert_within, gamma


def adapter(layer):
    return lora.LoRA(layer.A, layer.B, layer.scaling)


def equal(a, b):
    """Exactly equal, for arrays of fractions."""
    return a.shape == b.shape and bool(np.all(a == b))


@given(rational_layers)
def test_merged_is_the_same_function_over_the_rationals(t):
    merged = lora.merge(t.W, adapter(t))
    adapted = lora.forward(t.x, t.W, adapter(t), t.bias)
    assert equal(linear.forward(t.x, merged, t.bias), adapted)


@given(integer_layers)
def test_merged_is_the_same_function_bit_for_bit(t):
    merged = lora.merge(t.W, adapter(t))
    adapted = lora.forward(t.x, t.W, adapter(t), t.bias)
    assert_bits(linear.forward(t.x, merged, t.bias), adapted)


@given(gaussian_layers)
def test_merged_is_the_same_function_up_to_rounding(t):
    merged = linear.forward(t.x, lora.merge(t.W, adapter(t)), t.bias)
    adapted = lora.forward(t.x, t.W, adapter(t), t.bias)
    absolute = lora.LoRA(abs(t.A), abs(t.B), abs(t.scaling))
    bias = None if t.bias is None else abs(t.bias)
    size = lora.forward(abs(t.x), abs(t.W), absolute, bias).astype(np.float64)
    # Either way: sums over in_features and r, then scaling and two additions; and
    # the two results may err in opposite directions.
    roundings = t.W.shape[1] + t.A.shape[0] + 4
    assert_within(merged, adapted, 2 * gamma(roundings) * size)


@given(rational_layers)
def test_unmerging_gives_the_weight_back_over_the_rationals(t):
    merged = lora.merge(t.W, adapter(t))
    negative = lora.LoRA(t.A, t.B, -t.scaling)
    assert equal(lora.merge(merged, negative), t.W)


@given(rational_layers, st.data())
def test_gradients_are_exact_differences_over_the_rationals(t, data):
    # The loss <G, y> is linear in x, in A and in B taken one at a time, so a central
    # difference is not an approximation: it equals <gradient, step>.
    grads = lora.backward(t.grad_y, t.x, t.W, adapter(t))

    def loss(x, A, B):
        return (t.grad_y * lora.forward(x, t.W, lora.LoRA(A, B, t.scaling))).sum()

    for i, (value, gradient) in enumerate(zip((t.x, t.A, t.B), grads, strict=True)):
        step = data.draw(rationals(value.shape))
        up, down = [t.x, t.A, t.B], [t.x, t.A, t.B]
        up[i], down[i] = value + step, value - step
        assert (loss(*up) - loss(*down)) / 2 == (gradient * step).sum()


@given(rational_layers, st.data())
def test_the_update_does_not_depend_on_the_basis_of_the_rank_space(t, data):
    r = t.A.shape[0]
    # Unit triangular: invertible over the rationals, with an inverse by substitution.
    Q = np.tril(data.draw(rationals((r, r))), -1) + np.eye(r, dtype=int)
    changed = lora.LoRA(Q @ t.A, t.B @ _inverse(Q), t.scaling)
    assert equal(lora.delta(changed), lora.delta(adapter(t)))


@given(rational_layers)
def test_the_rank_of_the_update_is_at_most_r(t):
    assert _rank(lora.delta(adapter(t))) <= t.A.shape[0]


@given(seeds, sizes(), st.booleans())
def test_a_new_adapter_changes_nothing(seed, s, rank_stabilized):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((s.d, s.k)).astype(np.float32)
    x = rng.standard_normal((*s.lead, s.k)).astype(np.float32)
    new = lora.init(rng, s.k, s.d, s.r, 16, rank_stabilized)
    assert_bits(lora.forward(x, W, new), linear.forward(x, W))
    assert_bits(lora.merge(W, new), W)
    assert np.all(np.abs(new.A) <= 1 / np.sqrt(s.k))
    assert np.any(new.A != 0)


@given(integer_layers)
def test_nothing_given_is_changed(t):
    copies = [a.copy() for a in (t.x, t.W, t.A, t.B, t.grad_y)]
    lora.merge(t.W, adapter(t))
    lora.backward(t.grad_y, t.x, t.W, adapter(t))
    for before, after in zip(copies, (t.x, t.W, t.A, t.B, t.grad_y), strict=True):
        assert_bits(after, before)


def test_scaling_divides_by_the_rank_or_its_root():
    assert lora.scaling(32, 16) == 2
    assert lora.scaling(32, 16, rank_stabilized=True) == 8


@pytest.mark.parametrize("r", [0, -1, 4])
def test_a_rank_out_of_range_is_refused(r):
    with pytest.raises(InputError, match=rf"r is {r}; choose 1 to 3"):
        lora.init(np.random.default_rng(0), 3, 5, r, alpha=8)


@pytest.mark.parametrize(("A", "B"), [((2, 3), (1, 2)), ((2, 1), (5, 2))])
def test_matrices_of_another_layer_are_refused(A, B):
    W = np.ones((5, 3), np.float32)
    foreign = lora.LoRA(np.ones(A, np.float32), np.ones(B, np.float32), 2.0)
    with pytest.raises(
        InputError, match=r"it must be \((r|5), (3|2)\) beside W of shape"
    ):
        lora.merge(W, foreign)
    with pytest.raises(
        InputError, match=r"it must be \((r|5), (3|2)\) beside W of shape"
    ):
        lora.forward(W[:2], W, foreign)


def _inverse(Q):
    """Inverse of a unit lower triangular matrix, by forward substitution."""
    n = len(Q)
    X = np.array([[Fraction(int(i == j)) for j in range(n)] for i in range(n)])
    for i in range(n):
        for j in range(i):
            X[i] = X[i] - Q[i, j] * X[j]
    return X


def _rank(M):
    """Rank by elimination, exact for fractions."""
    rows, rank = [list(row) for row in M], 0
    for column in range(M.shape[1]):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for i in range(rank + 1, len(rows)):
            factor = Fraction(rows[i][column]) / rows[rank][column]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank
