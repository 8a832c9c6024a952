"""Laws of IA3 alone: the meaning of each side."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import ia3
from tests.exact import equal
from tests.operands import annotations_off
from tests.strategies import (
    rational_layers,
    rationals,
)
from tests.tolerance import assert_bits


@given(rational_layers, st.data())
def test_keys_scale_rows_and_feedforward_scales_columns(t, data):
    # A square weight fits both sides, so the side must be stored.
    W = data.draw(rationals((4, 4)))
    scale = data.draw(rationals((4,)))
    rows = ia3.merge(W, ia3.IA3(scale, side="output"))
    columns = ia3.merge(W, ia3.IA3(scale, side="input"))
    assert equal(rows, np.diag(scale) @ W)
    assert equal(columns, W @ np.diag(scale))


@given(rational_layers, st.data())
def test_the_bias_of_keys_is_scaled_and_that_of_feedforward_is_not(t, data):
    bias = data.draw(rationals((len(t.W),)))
    zero = Fraction(0) * t.x
    keys = ia3.IA3(data.draw(rationals((len(t.W),))), side="output")
    ff = ia3.IA3(data.draw(rationals((t.W.shape[1],))), side="input")
    still = Fraction(0) * t.grad_y
    assert equal(ia3.forward(zero, t.W, keys, bias), keys.l * bias + still)
    assert equal(ia3.forward(zero, t.W, ff, bias), bias + still)


@given(rational_layers, st.data())
def test_division_undoes_a_merge_only_where_l_is_not_zero(t, data):
    scale = data.draw(rationals((len(t.W),)))
    there = ia3.merge(t.W, ia3.IA3(scale, side="output"))
    inverse = np.array([0 if s == 0 else 1 / s for s in scale], object)
    back = ia3.merge(there, ia3.IA3(inverse, side="output"))
    kept = scale != 0
    assert equal(back[kept], t.W[kept])
    assert not np.any(back[~kept])


@given(rational_layers, st.data())
def test_the_vectors_of_two_adapters_multiply(t, data):
    first, second = (data.draw(rationals((len(t.W),))) for _ in range(2))
    one = ia3.merge(ia3.merge(t.W, ia3.IA3(first, "output")), ia3.IA3(second, "output"))
    assert equal(one, ia3.merge(t.W, ia3.IA3(first * second, "output")))


@pytest.mark.parametrize("l", [0.0, 1e-8, 1e-30, -1.0])
def test_merging_small_values_is_the_product_and_nothing_else(l):  # noqa: E741
    # An added 1e-8 against division by zero fails here.
    W = np.array([[3.0, 5.0, 7.0]], np.float32)
    a = ia3.IA3(np.array([l], np.float32), side="output")
    assert_bits(ia3.merge(W, a), np.float32(l) * W)


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_bias_is_not_merged_with_a_vector_of_two_axes(side):
    l, bias = np.ones((1, 4), np.float32), np.ones(4, np.float32)  # noqa: E741
    with annotations_off(), pytest.raises(InputError, match=r"^l has shape \(1, 4\)"):
        ia3.merge_bias(bias, ia3.IA3(l, side))
