"""Laws of one attention head: exact results, bounded results, and the gradient."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import attention
from minipeft.reference.attention import Head
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_within, central_difference, gamma


@st.composite
def heads(draw, dtype=np.float32, largest=6):
    """Draw a head with any batch axes; its mask is causal, random, or missing."""
    batch = draw(st.sampled_from([(), (2,), (2, 3)]))
    queries, d, d_v = (draw(st.integers(1, largest)) for _ in range(3))
    keys = queries + draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(seeds))
    holes = rng.random((queries, keys)) < 0.5
    holes[:, rng.integers(keys)] = True
    mask = draw(st.sampled_from([None, attention.causal(queries, keys), holes]))
    shapes = ((queries, d), (keys, d), (keys, d_v))
    Q, K, V = (rng.standard_normal((*batch, *s)).astype(dtype) for s in shapes)
    return Head(Q, K, V, mask)


@given(heads())
def test_weights_are_shares(head):
    P = attention.weights(head)
    keys = head.K.shape[-2]
    assert np.all(P >= 0)
    # The sum in the denominator, the division, and the sum of this test.
    assert_within(P.sum(axis=-1), np.ones(P.shape[:-1]), gamma(2 * keys - 1))
    if head.mask is not None:
        assert not np.any(P[..., ~head.mask])


@given(heads(), st.data())
def test_what_is_masked_does_not_matter(head, data):
    if head.mask is None:
        return
    key = data.draw(st.integers(0, head.K.shape[-2] - 1))
    query = data.draw(st.sampled_from(range(head.Q.shape[-2])))
    if head.mask[query, key]:
        return
    K, V = head.K.copy(), head.V.copy()
    K[..., key, :], V[..., key, :] = 7, -7
    changed = attention.forward(Head(head.Q, K, V, head.mask))
    assert_bits(changed[..., query, :], attention.forward(head)[..., query, :])


@given(seeds, st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 5))
def test_a_query_of_zero_takes_the_mean_bit_for_bit(seed, keys, d):
    # Equal shares that are a power of two, and integer values: no rounding.
    rng = np.random.default_rng(seed)
    K, V = rng.integers(-8, 9, (2, keys, d)).astype(np.float32)
    y = attention.forward(Head(np.zeros((3, d), np.float32), K, V))
    assert_bits(y, np.repeat(V.mean(axis=0)[None], 3, axis=0))


@given(heads(), st.data())
def test_a_query_that_sees_one_key_copies_its_value(head, data):
    queries, keys = head.Q.shape[-2], head.K.shape[-2]
    chosen = data.draw(
        st.lists(st.integers(0, keys - 1), min_size=queries, max_size=queries)
    )
    mask = np.zeros((queries, keys), bool)
    mask[range(queries), chosen] = True
    y = attention.forward(Head(head.Q, head.K, head.V, mask))
    assert_bits(y, np.ascontiguousarray(head.V[..., chosen, :]))


@given(heads(), seeds)
def test_the_order_of_the_keys_does_not_matter(head, seed):
    order = np.random.default_rng(seed).permutation(head.K.shape[-2])
    mask = None if head.mask is None else head.mask[:, order]
    shuffled = Head(head.Q, head.K[..., order, :], head.V[..., order, :], mask)
    P = attention.weights(head)
    assert_within(
        attention.weights(shuffled), P[..., order], rounding(head) * P[..., order]
    )


@given(heads(), st.sampled_from([1e3, -1e3]))
def test_large_logits_overflow_nowhere(head, size):
    y = attention.forward(Head(head.Q * np.float32(size), head.K, head.V, head.mask))
    assert np.all(np.isfinite(y))


def test_the_last_query_stands_at_the_last_key():
    assert attention.causal(2, 4).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]


def test_a_query_that_sees_nothing_is_refused():
    Q = K = V = np.ones((2, 3), np.float32)
    mask = np.array([[True, True], [False, False]])
    with pytest.raises(InputError, match="query 1 may look at no key"):
        attention.forward(Head(Q, K, V, mask))


def assert_slopes(loss, values, gradients, noise, seed):
    """Along a random step in each value, the gradient is the central difference."""
    for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        assert gradient.shape == value.shape
        step = np.random.default_rng(seed + i + 1).standard_normal(value.shape)

        def along(t, i=i, step=step):
            moved = (v + t * step if j == i else v for j, v in enumerate(values))
            return loss(*moved)

        slope, bound = central_difference(along, noise)
        assert_within((gradient * step).sum(), slope, bound)


def rounding(head, dtype="float32"):
    """Return the relative bound for the difference of two results for a share.

    A share is e_j / (e_1 + … + e_keys) with e_j = exp(l_j - max).
    """
    d, keys = head.Q.shape[-1], head.K.shape[-2]
    largest = (abs(head.Q) @ abs(head.K).swapaxes(-1, -2)).max() / np.sqrt(d)
    # A logit has d products, their sum, a root and a division: d + 2 roundings. The
    # subtraction of the maximum rounds once, relative to at most twice the largest
    # logit; an error of the maximum itself cancels in the fraction.
    argument = gamma(d + 4, dtype) * float(largest)
    # exp turns an absolute error of its argument into a relative error, in numerator
    # and denominator. exp itself errs by up to 3 last bits, which are 6 roundings, also
    # in both; then come keys - 1 sums and the division.
    return 2 * (np.expm1(2 * argument) + gamma(2 * 6 + keys, dtype))
