"""Laws of VeRA: over the rationals, in bits, and of the shared random pair."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import linear, vera
from tests.exact import assert_gradients, equal
from tests.strategies import (
    gaussian_layers,
    gaussians,
    integer_layers,
    integers,
    rational_layers,
    rationals,
    seeds,
    sizes,
)
from tests.tolerance import assert_bits, assert_within, gamma


@st.composite
def adapted(draw, layers, vectors):
    """A layer whose A and B are the shared pair, and its two vectors."""
    t = draw(layers)
    d = draw(vectors((len(t.A),)))
    b = draw(vectors((len(t.W),)).filter(lambda b: np.any(b != 0)))
    return t, vera.Projections(t.A, t.B), vera.VeRA(d, b)


proofs = adapted(rational_layers, rationals)


@given(proofs)
def test_merged_is_the_same_function_over_the_rationals(case):
    t, pair, v = case
    merged = vera.merge(t.W, pair, v)
    exact = vera.forward(t.x, t.W, pair, v, t.bias)
    assert equal(linear.forward(t.x, merged, t.bias), exact)


@given(adapted(integer_layers, integers))
def test_merged_is_the_same_function_bit_for_bit(case):
    t, pair, v = case
    v = vera.VeRA(np.sign(v.d), np.sign(v.b) * 2)  # keeps every sum below 2**24
    merged = vera.merge(t.W, pair, v)
    exact = vera.forward(t.x, t.W, pair, v, t.bias)
    assert_bits(linear.forward(t.x, merged, t.bias) + 0, exact + 0)


@given(adapted(gaussian_layers, gaussians))
def test_merged_is_the_same_function_up_to_rounding(case):
    t, pair, v = case
    merged = linear.forward(t.x, vera.merge(t.W, pair, v), t.bias)
    exact = vera.forward(t.x, t.W, pair, v, t.bias)
    absolute = vera.Projections(abs(t.A), abs(t.B)), vera.VeRA(abs(v.d), abs(v.b))
    bias = None if t.bias is None else abs(t.bias)
    size = vera.forward(abs(t.x), abs(t.W), *absolute, bias).astype(np.float64)
    # Sums over in_features and r, two scalings and two additions, either way.
    roundings = t.W.shape[1] + len(t.A) + 5
    assert_within(merged, exact, 2 * gamma(roundings) * size)


@given(proofs, st.data())
def test_gradients_are_exact_differences_over_the_rationals(case, data):
    t, pair, v = case

    def loss(x, d, b):
        return (t.grad_y * vera.forward(x, t.W, pair, vera.VeRA(d, b))).sum()

    grads = vera.backward(t.grad_y, t.x, t.W, pair, v)
    assert_gradients(loss, (t.x, v.d, v.b), grads, data)


@given(proofs)
def test_the_update_is_the_product_of_its_four_matrices(case):
    t, pair, v = case
    product = np.diag(v.b) @ pair.B @ np.diag(v.d) @ pair.A
    assert equal(vera.delta(pair, v), product)
    assert equal(vera.merge(t.W, pair, v) - t.W, product + 0 * t.W)


@given(proofs, st.integers(0, 3), st.integers(0, 3))
def test_a_small_layer_uses_the_corner_of_a_larger_pair(case, more_in, more_out):
    t, pair, v = case
    A = np.pad(pair.A, ((0, 0), (0, more_in)), constant_values=7)
    B = np.pad(pair.B, ((0, more_out), (0, 0)), constant_values=7)
    larger = vera.Projections(A, B)
    assert equal(vera.merge(t.W, larger, v), vera.merge(t.W, pair, v))
    small = vera.forward(t.x, t.W, larger, v, t.bias)
    assert equal(small, vera.forward(t.x, t.W, pair, v, t.bias))
    both = (vera.backward(t.grad_y, t.x, t.W, p, v) for p in (larger, pair))
    assert all(equal(a, b) for a, b in zip(*both, strict=True))


@given(seeds, sizes())
def test_a_new_adapter_changes_nothing(seed, s):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((s.d, s.k)).astype(np.float32)
    x = rng.standard_normal((*s.lead, s.k)).astype(np.float32)
    pair, new = vera.projections(seed, s.r, s.k, s.d), vera.init(s.r, s.d)
    assert_bits(vera.forward(x, W, pair, new), linear.forward(x, W))
    assert_bits(vera.merge(W, pair, new), W)
    assert np.all(new.d == np.float32(0.1))


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_the_pair_is_kaiming_uniform_and_repeats(seed, r, in_features, out_features):
    pair = vera.projections(seed, r, in_features, out_features)
    again = vera.projections(seed, r, in_features, out_features)
    for values, repeated in ((pair.A, again.A), (pair.B, again.B)):
        assert_bits(repeated, values)
        assert values.dtype == np.float32
        assert np.all(abs(values) <= np.float32(np.sqrt(6 / values.shape[1])))
    assert (pair.A.shape, pair.B.shape) == ((r, in_features), (out_features, r))


def test_a_is_drawn_first_and_from_one_stream():
    a, b = vera.projections(3, 2, 5, 4), vera.projections(3, 2, 5, 9)
    assert_bits(a.A, b.A)
    assert_bits(a.B, b.B[:4])  # more rows continue the stream
    assert not np.array_equal(a.A, vera.projections(4, 2, 5, 4).A)
    # More columns do not: row 1 begins later in the stream. So the largest layer, not
    # the one at hand, decides every number but those of the first row.
    wider = vera.projections(3, 2, 6, 4)
    ratio = np.float32(np.sqrt(6 / 6)) / np.float32(np.sqrt(6 / 5))
    assert_within(wider.A[0, :5], a.A[0] * ratio, gamma(6) * abs(a.A[0]))
    assert not np.any(wider.A[1, :5] == a.A[1])


def test_the_numbers_of_a_seed_never_change():
    pair = vera.projections(0, 2, 3, 4)
    # What torch 2.13 draws: torch.empty(2, 3).uniform_(-2**0.5, 2**0.5), seed 0.
    assert pair.A.tobytes().hex() == "22792dbc9c36423fb1fc94bf1d3885bfd6700bbfab2ac23e"
    assert pair.B.tobytes().hex() == (
        "70900cbd1cc9af3ff1651dbe3ba9ea3eb70006bfef50aebe9bcdd3bf61d492bf"
    )


@given(seeds, st.integers(1, 30), st.integers(1, 30))
def test_the_one_rounding_is_exact_arithmetic_rounded_once(seed, rows, columns):
    words = np.random.RandomState(seed).randint(0, 2**32, rows * columns, np.uint32)
    bound = Fraction(float(np.float32(np.sqrt(6 / columns))))
    exact = [bound * (2 * Fraction(int(w) & 0xFFFFFF, 2**24) - 1) for w in words]
    drawn = vera.kaiming_uniform(np.random.RandomState(seed), rows, columns)
    # float(Fraction) rounds correctly, and 48 bits fit in a float64.
    assert all(Fraction(float(value)) == value for value in exact)
    assert_bits(drawn.reshape(-1), np.array([float(v) for v in exact], np.float32))


@given(adapted(integer_layers, integers))
def test_nothing_given_is_changed(case):
    t, pair, v = case
    given_values = (t.x, t.W, t.A, t.B, t.grad_y, v.d, v.b)
    copies = [a.copy() for a in given_values]
    vera.merge(t.W, pair, v)
    vera.backward(t.grad_y, t.x, t.W, pair, v)
    for before, after in zip(copies, given_values, strict=True):
        assert_bits(after, before)


def test_a_pair_that_is_too_small_is_refused():
    pair, v = vera.projections(0, 2, 3, 4), vera.init(2, 5)
    with pytest.raises(InputError, match=r"up to \(4, 3\).*here \(5, 3\)"):
        vera.forward(np.ones(3), np.ones((5, 3)), pair, v)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_the_stream_does_not_have_is_refused(seed):
    with pytest.raises(InputError, match=f"seed is {seed}"):
        vera.projections(seed, 2, 3, 4)


def test_an_empty_pair_is_refused():
    with pytest.raises(InputError, match="r is 0"):
        vera.projections(0, 0, 3, 4)
