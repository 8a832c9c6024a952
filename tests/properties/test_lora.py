"""Laws of LoRA alone: its scaling, its rank, its initial value."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import lora
from tests.exact import equal
from tests.strategies import rational_layers, rationals, seeds, sizes


def adapter(layer):
    return lora.LoRA(layer.A, layer.B, layer.scaling)


@given(rational_layers)
def test_unmerging_gives_the_weight_back_over_the_rationals(t):
    merged = lora.merge(t.W, adapter(t))
    negative = lora.LoRA(t.A, t.B, -t.scaling)
    assert equal(lora.merge(merged, negative), t.W)


@given(rational_layers, st.data())
def test_the_update_does_not_depend_on_the_basis_of_the_rank_space(t, data):
    r = t.A.shape[0]
    # A unit triangular matrix has a rational inverse, found by substitution.
    Q = np.tril(data.draw(rationals((r, r))), -1) + np.eye(r, dtype=int)
    changed = lora.LoRA(Q @ t.A, t.B @ _inverse(Q), t.scaling)
    assert equal(lora.delta(changed), lora.delta(adapter(t)))


@given(rational_layers)
def test_the_rank_of_the_update_is_at_most_r(t):
    assert _rank(lora.delta(adapter(t))) <= t.A.shape[0]


def test_scaling_divides_by_the_rank_or_its_root():
    assert lora.scaling(32, 16) == 2
    assert lora.scaling(32, 16, rank_stabilized=True) == 8


@given(seeds, sizes())
def test_a_starts_uniform_within_its_bound(seed, s):
    new = lora.init(np.random.default_rng(seed), s.k, s.d, s.r, 16)
    assert np.all(np.abs(new.A) <= 1 / np.sqrt(s.k))
    assert np.any(new.A != 0)


@pytest.mark.parametrize("r", [0, -1, 4])
def test_a_rank_out_of_range_is_refused(r):
    with pytest.raises(InputError, match=rf"r is {r}; choose 1 to 3"):
        lora.init(np.random.default_rng(0), 3, 5, r, alpha=8)


def _inverse(Q):
    """Return the inverse of a unit lower triangular matrix, by forward substitution."""
    n = len(Q)
    X = np.array([[Fraction(int(i == j)) for j in range(n)] for i in range(n)])
    for i in range(n):
        for j in range(i):
            X[i] = X[i] - Q[i, j] * X[j]
    return X


def _rank(M):
    """Return the rank by elimination, exact for fractions."""
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


@given(rational_layers, st.data())
def test_a_weighted_sum_is_the_sum_of_the_updates(t, data):
    q = data.draw(st.integers(1, 4))
    A, B = data.draw(rationals((q, t.A.shape[1]))), data.draw(rationals((len(t.B), q)))
    one, other = adapter(t), lora.LoRA(A, B, Fraction(3, 2))
    total = lora.weighted_sum(one, other, 3, -2)
    assert len(total.A) == len(t.A) + q
    assert equal(lora.delta(total), 3 * lora.delta(one) - 2 * lora.delta(other))


@given(rational_layers)
def test_a_merge_changes_one_of_two_tied_layers(t):
    merged = lora.merge(t.W, adapter(t))
    for layer, expected in ("head", (t.W, merged)), ("embedding", (merged, t.W)):
        assert all(map(equal, lora.merge_tied(t.W, adapter(t), layer), expected))
    with pytest.raises(InputError, match="layer is 'tail'; choose 'embedding'"):
        lora.merge_tied(t.W, adapter(t), "tail")
