"""Laws of DoRA alone: its norm, the norm's constancy in the gradient, and zero rows."""

import tracemalloc
from dataclasses import replace

import numpy as np
from hypothesis import assume, given

from minipeft.reference import dora, lora
from tests.bounds import assert_both_within, bound, counted
from tests.exact import equal
from tests.strategies import (
    gaussian_layers,
    integer_layers,
    rational_layers,
    seeds,
    sizes,
)
from tests.tolerance import assert_within, gamma


def adapter(layer, magnitude):
    return dora.DoRA(layer.A, layer.B, layer.scaling, magnitude)


@given(rational_layers)
def test_the_expanded_norm_is_the_norm_of_the_sum_over_the_rationals(t):
    update = lora.LoRA(t.A, t.B, t.scaling)
    V = t.W + t.scaling * (t.B @ t.A)
    assert equal(dora.squared_row_norm(t.W, update), (V * V).sum(axis=1))


@given(gaussian_layers, seeds)
def test_the_gradient_holds_the_norm_of_the_whole_row_constant(t, seed):
    # In float64, along one step in A and B, the loss changes as if ||W + s B A|| were
    # constant.
    rng = np.random.default_rng(seed)
    wide = [np.float64(v) for v in (t.x, t.W, t.A, t.B, t.grad_y)]
    x, W, A, B, G = wide
    d = dora.DoRA(A, B, t.scaling, rng.standard_normal(len(W)))
    norm = dora.row_norm(W, d.lora)
    assume(norm.min() > 0)
    grads = dora.backward(G, x, W, d)

    def loss(changed):
        return (G * dora._forward(x, W, changed, None, norm)).sum()

    operands = [counted(v) for v in (G, x, W)]
    size = dora.DoRA(counted(A), counted(B), t.scaling, counted(d.magnitude))
    big = dora._backward(*operands, size, norm)
    for name, value in (("A", A), ("B", B)):
        step = rng.standard_normal(value.shape)
        up, down = (replace(d, **{name: v}) for v in (value + step, value - step))
        reach = replace(size, **{name: counted(abs(value) + abs(step))})
        y = dora._forward(operands[1], operands[2], reach, None, norm)
        slope = (getattr(big, name) * counted(step)).sum()
        expected = (getattr(grads, name) * step).sum()
        # The error of (loss - loss) / 2 is at most the error of one loss.
        formulas = ((operands[0] * y).sum(), slope)
        difference = (loss(up) - loss(down)) / 2
        assert_both_within(difference, expected, *formulas, dtype="float64")


@given(seeds, sizes())
def test_every_merged_row_has_the_trained_length(seed, s):
    # A norm over the wrong axis, or of W alone, fails here, also on square weights.
    rng = np.random.default_rng(seed)
    for out_features in (s.d, s.k):
        r = min(s.r, out_features)
        W, B = rng.standard_normal((out_features, s.k)), np.ones((out_features, r))
        A, m = rng.standard_normal((r, s.k)), rng.standard_normal(out_features)
        d = dora.DoRA(A, B, 0.3, m)
        square = dora.squared_row_norm(W, d.lora)
        size = lora.LoRA(counted(A), counted(B), 0.3)
        off = bound(dora.squared_row_norm(counted(W), size), "float64") / square
        V_off = bound(lora.merge(counted(W), size), "float64")
        off += np.linalg.norm(V_off, axis=1) / np.sqrt(square)
        # A root, a quotient, a product; and the squares, sums and root of this test.
        off += gamma(s.k + 5, "float64")
        assume(np.all(off < 1e-3))  # so that the second order is below the first
        lengths = np.linalg.norm(dora.merge(W, d), axis=1)
        assert_within(lengths, abs(m), 2 * off * abs(m))


@given(gaussian_layers, seeds)
def test_order_of_rows_and_columns_does_not_matter(t, seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(len(t.W)), rng.permutation(t.W.shape[1])
    wide = [np.float64(v) for v in (t.W, t.A, t.B)]
    W, A, B = wide
    norm = dora.squared_row_norm(W, lora.LoRA(A, B, t.scaling))
    shuffled = lora.LoRA(A[:, columns], B[rows], t.scaling)
    moved = dora.squared_row_norm(W[rows][:, columns], shuffled)
    size = lora.LoRA(counted(A), counted(B), t.scaling)
    sizes_ = dora.squared_row_norm(counted(W), size)[rows]
    assert_both_within(moved, norm[rows], sizes_, sizes_, dtype="float64")


@given(integer_layers, seeds)
def test_a_zero_row_stays_zero_and_its_output_is_the_bias(t, seed):
    rng = np.random.default_rng(seed)
    row = int(rng.integers(len(t.W)))
    W, magnitude = t.W.copy(), rng.standard_normal(len(t.W), np.float32)
    W[row] = -t.scaling * (t.B[row] @ t.A)  # integers cancel exactly
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
    assert peak < 4 * (4 * (1024 + 2048) + 8 * 2048)  # A and B, and a few rows
