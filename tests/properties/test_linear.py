"""Laws of the linear layer: over the rationals, in bits, and in derived bounds."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.reference import linear
from tests.exact import assert_gradients, equal
from tests.strategies import (
    gaussian_layers,
    integer_layers,
    rational_layers,
    rationals,
)
from tests.tolerance import assert_bits, assert_sums, assert_within, gamma


def exactly(array):
    """The same numbers as fractions."""
    fractions = np.empty(array.shape, object)
    fractions.reshape(-1)[:] = [Fraction(float(value)) for value in array.flat]
    return fractions


@given(rational_layers)
def test_each_output_is_its_sum_of_products(t):
    y = linear.forward(t.x, t.W, t.bias)
    for place in np.ndindex(y.shape):
        *position, i = place
        terms = zip(t.x[tuple(position)], t.W[i], strict=True)
        bias = 0 if t.bias is None else t.bias[i]
        assert y[place] == sum((a * b for a, b in terms), start=bias)


@given(rational_layers, st.data())
def test_the_layer_is_linear_in_x_and_affine_with_a_bias(t, data):
    other = data.draw(rationals(t.x.shape))
    a, b = Fraction(3, 7), Fraction(-5, 2)
    both = linear.forward(a * t.x + b * other, t.W)
    apart = a * linear.forward(t.x, t.W) + b * linear.forward(other, t.W)
    assert equal(both, apart)
    zero = linear.forward(0 * t.x, t.W, t.bias)
    assert equal(linear.forward(t.x, t.W, t.bias) - zero, linear.forward(t.x, t.W))


@given(rational_layers, st.data())
def test_two_layers_are_the_layer_of_the_product(t, data):
    V = data.draw(rationals((3, len(t.W))))
    twice = linear.forward(linear.forward(t.x, t.W), V)
    assert equal(twice, linear.forward(t.x, V @ t.W))


@given(rational_layers, st.data())
def test_gradients_are_exact_differences_over_the_rationals(t, data):
    bias = data.draw(rationals((t.W.shape[0],)))

    def loss(x, W, b):
        return (t.grad_y * linear.forward(x, W, b)).sum()

    grads = linear.backward(t.grad_y, t.x, t.W)
    assert_gradients(loss, (t.x, t.W, bias), grads, data)


@given(integer_layers)
def test_positions_do_not_meet_bit_for_bit(t):
    y = linear.forward(t.x, t.W, t.bias)
    for position in np.ndindex(t.x.shape[:-1]):
        assert_sums(y[position], linear.forward(t.x[position], t.W, t.bias))


@given(integer_layers)
def test_gradients_are_those_of_the_positions_added_bit_for_bit(t):
    together = linear.backward(t.grad_y, t.x, t.W)
    W, bias = np.zeros_like(together.W), np.zeros_like(together.bias)
    for position in np.ndindex(t.x.shape[:-1]):
        alone = linear.backward(t.grad_y[position], t.x[position], t.W)
        W, bias = W + alone.W, bias + alone.bias
        assert_sums(together.x[position], alone.x)
    assert_sums(together.W, W)
    assert_sums(together.bias, bias)


@given(integer_layers, st.data())
def test_outputs_follow_the_rows_of_the_weight_bit_for_bit(t, data):
    order = data.draw(st.permutations(range(len(t.W))))
    bias = None if t.bias is None else t.bias[order]
    permuted = linear.forward(t.x, t.W[order], bias)
    assert_sums(permuted, linear.forward(t.x, t.W, t.bias)[..., order])


@given(gaussian_layers)
def test_outputs_are_the_exact_ones_up_to_their_roundings(t):
    bias = None if t.bias is None else exactly(t.bias)
    exact = linear.forward(exactly(t.x), exactly(t.W), bias)
    size = linear.forward(
        abs(t.x).astype(float),
        abs(t.W).astype(float),
        None if t.bias is None else abs(t.bias).astype(float),
    )
    # A sum over in_features and the bias.
    bound = gamma(t.W.shape[1] + 1) * size
    assert_within(linear.forward(t.x, t.W, t.bias), exact, bound)


@given(gaussian_layers)
def test_gradients_are_the_exact_ones_up_to_their_roundings(t):
    values = (t.grad_y, t.x, t.W)
    exact = linear.backward(*(exactly(v) for v in values))
    sizes = linear.backward(*(abs(v).astype(float) for v in values))
    rows = t.x.size // t.x.shape[-1]
    roundings = (len(t.W), rows, rows)
    got = linear.backward(*values)
    for ours, right, size, n in zip(got, exact, sizes, roundings, strict=True):
        assert_within(ours, right, gamma(n) * size)


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_an_empty_batch_has_no_outputs_and_gradients_of_zero(lead):
    x, W = np.ones((*lead, 3), np.float32), np.ones((5, 3), np.float32)
    y = linear.forward(x, W, np.ones(5, np.float32))
    assert y.shape == (*lead, 5)
    grads = linear.backward(y, x, W)
    assert grads.x.shape == x.shape
    assert_bits(grads.W, np.zeros_like(W))
    assert_bits(grads.bias, np.zeros(5, np.float32))


@given(integer_layers)
def test_nothing_given_is_changed(t):
    copies = [a.copy() for a in (t.x, t.W, t.grad_y)]
    linear.forward(t.x, t.W, t.bias)
    linear.backward(t.grad_y, t.x, t.W)
    for before, after in zip(copies, (t.x, t.W, t.grad_y), strict=True):
        assert_bits(after, before)
