"""Laws of VeRA alone: its shared random pair."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import vera
from tests.exact import equal
from tests.parametrizations import ROWS
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_within, gamma

ROW = next(row for row in ROWS if row.name == "vera")


@given(st.data())
def test_the_update_is_the_product_of_its_four_matrices(data):
    case = ROW.case(data, "fractions")
    (pair,), v, W = case.frozen, case.adapter, case.base
    product = np.diag(v.b) @ pair.B @ np.diag(v.d) @ pair.A
    assert equal(vera.delta(pair, v), product)
    assert equal(vera.merge(W, pair, v) - W, product + 0 * W)


@given(st.data(), st.integers(0, 3), st.integers(0, 3))
def test_a_small_layer_uses_the_corner_of_a_larger_pair(data, more_in, more_out):
    case = ROW.case(data, "fractions")
    (pair,) = case.frozen
    A = np.pad(pair.A, ((0, 0), (0, more_in)), constant_values=7)
    B = np.pad(pair.B, ((0, more_out), (0, 0)), constant_values=7)
    larger = replace(case, frozen=(vera.Projections(A, B),))
    assert equal(larger.merged(), case.merged())
    assert equal(larger.forward(), case.forward())
    both = zip(larger.backward(), case.backward(), strict=True)
    assert all(equal(a, b) for a, b in both)


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
    # More columns change the rows after the first: row 1 begins later in the stream. So
    # all numbers but those of row 0 depend on the largest layer, not on the layer that
    # uses them.
    wider = vera.projections(3, 2, 6, 4)
    ratio = np.float32(np.sqrt(6 / 6)) / np.float32(np.sqrt(6 / 5))
    # Both numbers are rounded once; so are the ratio of the bounds and its product.
    scaled = a.A[0] * ratio
    assert_within(wider.A[0, :5], scaled, gamma(4) * abs(scaled))
    assert not np.any(wider.A[1, :5] == a.A[1])


def test_the_numbers_of_a_seed_never_change():
    pair = vera.projections(0, 2, 3, 4)
    # The numbers of torch 2.13: torch.empty(2, 3).uniform_(-2**0.5, 2**0.5), seed 0.
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
    # float(Fraction) rounds correctly, and a float64 holds 48 bits exactly.
    assert all(Fraction(float(value)) == value for value in exact)
    assert_bits(drawn.reshape(-1), np.array([float(v) for v in exact], np.float32))


def test_a_pair_that_is_too_small_is_refused():
    pair, v = vera.projections(0, 2, 3, 4), vera.init(2, 5)
    with pytest.raises(InputError, match=r"up to \(4, 3\).*here \(5, 3\)"):
        vera.forward(np.ones(3), np.ones((5, 3)), pair, v)


@pytest.mark.parametrize("sizes", [(-1, 4), (4, -1)])
def test_a_layer_without_a_size_is_refused(sizes):
    pair = vera.projections(0, 2, 6, 5)
    for call in (
        lambda: vera.projections(0, 2, *sizes),
        lambda: vera.projections(0, 2, *(max(0, n) for n in sizes)),
        lambda: vera.fit(pair, *sizes),
        lambda: vera.init(2, min(sizes)),
    ):
        with pytest.raises(InputError, match=r"or more\.$"):
            call()
