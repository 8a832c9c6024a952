"""Laws of IA3: over the rationals and in bits."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.reference import ia3, linear
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

SIDES = ("output", "input")


@st.composite
def rescaled(draw, layers, vectors):
    """A layer and its IA3, on either side; some of l may be zero."""
    t, side = draw(layers), draw(st.sampled_from(SIDES))
    scale = draw(vectors((t.W.shape[SIDES.index(side)],)))
    if draw(st.booleans()):
        scale[0] = 0 * scale[0]
    return t, ia3.IA3(scale, side)


proofs = rescaled(rational_layers, rationals)


def merged(t, a):
    bias = None if t.bias is None else ia3.merge_bias(t.bias, a)
    return linear.forward(t.x, ia3.merge(t.W, a), bias)


@given(proofs)
def test_merged_is_the_same_function_over_the_rationals(case):
    t, a = case
    assert equal(merged(t, a), ia3.forward(t.x, t.W, a, t.bias))


@given(rescaled(integer_layers, integers))
def test_merged_is_the_same_function_bit_for_bit(case):
    t, a = case
    # A sum times zero is -0 where it was negative; adding 0 forgets that sign.
    assert_bits(merged(t, a) + 0, ia3.forward(t.x, t.W, a, t.bias) + 0)


@given(rescaled(gaussian_layers, gaussians))
def test_merged_is_the_same_function_up_to_rounding(case):
    t, a = case
    bias = None if t.bias is None else abs(t.bias)
    absolute = ia3.IA3(abs(a.l), a.side)
    size = ia3.forward(abs(t.x), abs(t.W), absolute, bias).astype(np.float64)
    exact = ia3.forward(t.x, t.W, a, t.bias)
    # One product, the sum over in_features, the bias and its product, either way.
    assert_within(merged(t, a), exact, 2 * gamma(t.W.shape[1] + 3) * size)


@given(proofs, st.data())
def test_gradients_are_exact_differences_over_the_rationals(case, data):
    t, a = case

    def loss(x, scale):
        changed = ia3.IA3(scale, a.side)
        return (t.grad_y * ia3.forward(x, t.W, changed, t.bias)).sum()

    grads = ia3.backward(t.grad_y, t.x, t.W, a, t.bias)
    assert_gradients(loss, (t.x, a.l), grads, data)


@given(seeds, sizes(), st.sampled_from(SIDES))
def test_a_new_adapter_changes_nothing(seed, s, side):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((s.d, s.k)).astype(np.float32)
    x = rng.standard_normal((*s.lead, s.k)).astype(np.float32)
    bias = rng.standard_normal(s.d).astype(np.float32)
    new = ia3.init(s.k if side == "input" else s.d, side)
    assert_bits(ia3.forward(x, W, new, bias), linear.forward(x, W, bias))
    assert_bits(ia3.merge(W, new), W)
    assert_bits(ia3.merge_bias(bias, new), bias)


@given(rational_layers, st.data())
def test_keys_scale_rows_and_feedforward_scales_columns(t, data):
    # On a square weight both would run: the side is part of the meaning.
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


@given(rescaled(integer_layers, integers))
def test_nothing_given_is_changed(case):
    t, a = case
    copies = [v.copy() for v in (t.x, t.W, a.l, t.grad_y)]
    ia3.merge(t.W, a)
    ia3.backward(t.grad_y, t.x, t.W, a, t.bias)
    for before, after in zip(copies, (t.x, t.W, a.l, t.grad_y), strict=True):
        assert_bits(after, before)


@pytest.mark.parametrize("l", [0.0, 1e-8, 1e-30, -1.0])
def test_merging_small_values_is_the_product_and_nothing_else(l):  # noqa: E741
    # A 1e-8 added "for safety" anywhere shows here.
    W = np.array([[3.0, 5.0, 7.0]], np.float32)
    a = ia3.IA3(np.array([l], np.float32), side="output")
    assert_bits(ia3.merge(W, a), np.float32(l) * W)
