"""Laws of DoRA; the norm is data where a law is proved over the rationals."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import dora, linear, lora
from tests.exact import assert_gradients, equal
from tests.strategies import (
    gaussian_layers,
    integer_layers,
    rational_layers,
    rationals,
    seeds,
    sizes,
)
from tests.tolerance import assert_bits, assert_within, gamma


def adapter(layer, magnitude):
    return dora.DoRA(layer.A, layer.B, layer.scaling, magnitude)


@st.composite
def with_norm(draw, layers, vectors):
    """A layer, its DoRA, and a norm given as data; some rows may have norm zero."""
    t = draw(layers)
    magnitude, norm = (draw(vectors((len(t.W),))) for _ in range(2))
    return t, adapter(t, magnitude), abs(norm)


@st.composite
def powers_of_two(draw, shape):
    rng = np.random.default_rng(draw(seeds))
    return 2.0 ** rng.integers(-3, 4, shape).astype(np.float32)


proofs = with_norm(rational_layers, rationals)


@given(rational_layers)
def test_the_expanded_norm_is_the_norm_of_the_sum_over_the_rationals(t):
    update = lora.LoRA(t.A, t.B, t.scaling)
    V = t.W + t.scaling * (t.B @ t.A)
    assert equal(dora.squared_row_norm(t.W, update), (V * V).sum(axis=1))


@given(proofs)
def test_merged_is_the_same_function_over_the_rationals(given_norm):
    t, d, norm = given_norm
    merged = dora._merge(t.W, d, norm)
    adapted = dora._forward(t.x, t.W, d, t.bias, norm)
    assert equal(linear.forward(t.x, merged, t.bias), adapted)


@given(with_norm(integer_layers, powers_of_two))
def test_merged_is_the_same_function_bit_for_bit(given_norm):
    t, d, norm = given_norm
    merged = dora._merge(t.W, d, norm)
    adapted = dora._forward(t.x, t.W, d, t.bias, norm)
    assert_bits(linear.forward(t.x, merged, t.bias), adapted)


@given(gaussian_layers, seeds)
def test_merged_is_the_same_function_up_to_rounding(t, seed):
    magnitude = np.random.default_rng(seed).standard_normal(len(t.W), np.float32)
    d = adapter(t, magnitude)
    norm = dora.row_norm(t.W, d.lora)
    merged = linear.forward(t.x, dora.merge(t.W, d), t.bias)
    adapted = dora.forward(t.x, t.W, d, t.bias)
    absolute = dora.DoRA(abs(t.A), abs(t.B), abs(t.scaling), abs(magnitude))
    bias = None if t.bias is None else abs(t.bias)
    size = dora._forward(abs(t.x), abs(t.W), absolute, bias, norm).astype(np.float64)
    # Sums over in_features and r, scaling, two additions, the division and the gain.
    roundings = t.W.shape[1] + t.A.shape[0] + 6
    assert_within(merged, adapted, 2 * gamma(roundings) * size)


@given(proofs, st.data())
def test_gradients_are_exact_differences_over_the_rationals(given_norm, data):
    t, d, norm = given_norm

    def loss(x, A, B, magnitude):
        changed = dora.DoRA(A, B, t.scaling, magnitude)
        return (t.grad_y * dora._forward(x, t.W, changed, None, norm)).sum()

    values = (t.x, t.A, t.B, d.magnitude)
    assert_gradients(loss, values, dora._backward(t.grad_y, t.x, t.W, d, norm), data)


@given(gaussian_layers, seeds)
def test_the_gradient_holds_the_norm_of_the_whole_row_constant(t, seed):
    # In float64, along one step in A and B: the loss moves as if ||W + s B A|| did not.
    rng = np.random.default_rng(seed)
    wide = [np.float64(v) for v in (t.x, t.W, t.A, t.B, t.grad_y)]
    x, W, A, B, G = wide
    d = dora.DoRA(A, B, t.scaling, rng.standard_normal(len(W)))
    norm = dora.row_norm(W, d.lora)
    assume(norm.min() > 0)
    grads = dora.backward(G, x, W, d)

    def loss(changed):
        return (G * dora._forward(x, W, changed, None, norm)).sum()

    for name, value in (("A", A), ("B", B)):
        step = rng.standard_normal(value.shape)
        up, down = (replace(d, **{name: v}) for v in (value + step, value - step))
        sizes_ = [abs(getattr(up, n)) + abs(getattr(down, n)) for n in ("A", "B")]
        big = dora.DoRA(*sizes_, abs(t.scaling), abs(d.magnitude))
        size = (abs(G) * dora._forward(abs(x), abs(W), big, None, norm)).sum()
        # All sums, one after the other: over x, r, rows and positions.
        roundings = W.shape[1] + len(A) + G.size + 8
        expected = (getattr(grads, name) * step).sum()
        bound = 4 * gamma(roundings, "float64") * size
        assert_within((loss(up) - loss(down)) / 2, expected, bound)


@given(seeds, sizes())
def test_every_merged_row_has_the_trained_length(seed, s):
    # The norm over the wrong axis, or of W alone, breaks this, on square weights too.
    rng = np.random.default_rng(seed)
    for out_features in (s.d, s.k):
        r = min(s.r, out_features)
        W, B = rng.standard_normal((out_features, s.k)), np.ones((out_features, r))
        A, m = rng.standard_normal((r, s.k)), rng.standard_normal(out_features)
        d = dora.DoRA(A, B, 0.3, m)
        absolute = lora.LoRA(abs(A), abs(B), 0.3)
        size = dora.squared_row_norm(abs(W), absolute)
        condition = size / dora.squared_row_norm(W, d.lora)
        assume(np.all(condition < 1e6) and np.all(condition > 0))
        lengths = np.linalg.norm(dora.merge(W, d), axis=1)
        roundings = 2 * s.k + 3 * r + 12
        bound = gamma(roundings, "float64") * condition * abs(m)
        assert_within(lengths, abs(m), 2 * bound)


@given(gaussian_layers, seeds)
def test_order_of_rows_and_columns_does_not_matter(t, seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(len(t.W)), rng.permutation(t.W.shape[1])
    wide = [np.float64(v) for v in (t.W, t.A, t.B)]
    W, A, B = wide
    norm = dora.squared_row_norm(W, lora.LoRA(A, B, t.scaling))
    shuffled = lora.LoRA(A[:, columns], B[rows], t.scaling)
    moved = dora.squared_row_norm(W[rows][:, columns], shuffled)
    absolute = lora.LoRA(abs(A), abs(B), abs(t.scaling))
    size = dora.squared_row_norm(abs(W), absolute)[rows]
    roundings = W.shape[1] + 2 * len(A) + 6
    assert_within(moved, norm[rows], 2 * gamma(roundings, "float64") * size)


@given(proofs, st.data())
def test_the_bias_is_not_scaled(given_norm, data):
    t, d, norm = given_norm
    bias = data.draw(rationals((len(t.W),)))
    without = dora._forward(t.x, t.W, d, None, norm)
    assert equal(dora._forward(t.x, t.W, d, bias, norm) - without, bias + 0 * without)


@given(seeds, sizes())
def test_a_new_adapter_changes_nothing(seed, s):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((s.d, s.k)).astype(np.float32)
    x = rng.standard_normal((*s.lead, s.k)).astype(np.float32)
    bias = rng.standard_normal(s.d).astype(np.float32)
    new = dora.init(rng, W, s.r, 16)
    assert_bits(dora.forward(x, W, new, bias), linear.forward(x, W, bias))
    assert_bits(dora.merge(W, new), W)
    assert new.magnitude.shape == (s.d,)


@given(integer_layers, seeds)
def test_a_zero_row_stays_zero_and_its_output_is_the_bias(t, seed):
    rng = np.random.default_rng(seed)
    row = int(rng.integers(len(t.W)))
    W, magnitude = t.W.copy(), rng.standard_normal(len(t.W), np.float32)
    W[row] = -t.scaling * (t.B[row] @ t.A)  # cancels exactly: these are integers
    d = adapter(t, magnitude)
    y = dora.forward(t.x, W, d, t.bias)
    grads = dora.backward(t.grad_y, t.x, W, d)
    assert np.all(y[..., row] == (0 if t.bias is None else t.bias[row]))
    assert np.all(dora.merge(W, d)[row] == 0)
    assert np.all(grads.B[row] == 0)
    assert grads.magnitude[row] == 0
    assert all(np.isfinite(g).all() for g in (y, *grads))


def test_the_norm_never_forms_the_update():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((2048, 1024), np.float32)
    new = lora.init(rng, 1024, 2048, r=4, alpha=8)
    tracemalloc.start()
    dora.row_norm(W, new)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * (4 * (1024 + 2048) + 8 * 2048)  # (in + out) r and a few rows


@given(integer_layers, seeds)
def test_nothing_given_is_changed(t, seed):
    magnitude = np.random.default_rng(seed).standard_normal(len(t.W), np.float32)
    given_values = (t.x, t.W, t.A, t.B, t.grad_y, magnitude)
    copies = [a.copy() for a in given_values]
    d = adapter(t, magnitude)
    dora.forward(t.x, t.W, d, t.bias)
    dora.merge(t.W, d)
    dora.backward(t.grad_y, t.x, t.W, d)
    for before, after in zip(copies, given_values, strict=True):
        assert_bits(after, before)


@pytest.mark.parametrize("r", [0, 4])
def test_a_rank_out_of_range_is_refused(r):
    with pytest.raises(InputError, match=rf"r is {r}; choose 1 to 3"):
        dora.init(np.random.default_rng(0), np.ones((5, 3), np.float32), r, 8)
