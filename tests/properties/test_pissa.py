"""Laws of PiSSA: the split, its optimality, the conversion to LoRA, and roundings."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import linear, lora, pissa
from minipeft.reference.lora import LoRA
from tests.bounds import assert_both_within, bound, counted
from tests.strategies import gaussians, rational_layers, rationals, seeds
from tests.tolerance import assert_bits, assert_within, gamma, svd_roundings

alphas = st.sampled_from([1.0, 3.0, 16.0, 100.0])


@st.composite
def problems(draw, largest=24):
    """A weight with decaying singular values, a rank and an alpha."""
    d, k = draw(st.integers(2, largest)), draw(st.integers(2, largest))
    rng = np.random.default_rng(draw(seeds))
    n = min(d, k)
    U = np.linalg.qr(rng.standard_normal((d, n))).Q
    V = np.linalg.qr(rng.standard_normal((k, n))).Q
    decay = draw(st.sampled_from([0.0, 0.5, 2.0]))
    S = np.arange(1, n + 1) ** -decay
    W = (U * S @ V.T).astype(np.float32)
    return W, draw(st.integers(1, n)), draw(alphas)


def norm(M):
    return float(np.linalg.norm(M.astype(np.float64)))


def rounding(W):
    """Bound the error of an SVD in float32, in the Frobenius norm."""
    return gamma(svd_roundings(W)) * norm(W)


def there_and_back(W, base, initial):
    """Bound the roundings of subtracting the adapter from W and adding it again."""
    sizes = lora.LoRA(counted(initial.A), counted(initial.B), initial.scaling)
    taken_off = pissa.residual(counted(W), sizes)
    return bound(taken_off) + bound(lora.merge(counted(base), sizes))


@given(problems())
def test_base_and_adapter_sum_to_the_weight_at_any_scaling(t):
    W, r, alpha = t
    base, initial = pissa.init(W, r, alpha)
    assert initial.scaling == alpha / r
    assert_within(lora.merge(base, initial), W, there_and_back(W, base, initial))


@given(problems())
def test_nothing_of_that_rank_is_nearer(t):
    W, r, alpha = t
    S = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    base, initial = pissa.init(W, r, alpha)
    best = float(np.sqrt(np.square(S[r:]).sum()))
    assert abs(norm(base) - best) <= rounding(W)
    assert np.linalg.matrix_rank(lora.delta(initial)) <= r


@given(problems())
def test_the_scaling_moves_the_factors_and_not_the_split(t):
    W, r, alpha = t
    base, initial = pissa.init(W, r, alpha)
    other, scaled = pissa.init(W, r, 4 * alpha)  # the root of 4 is exact
    assert_bits(scaled.A * np.float32(2), initial.A)
    assert_bits(scaled.B * np.float32(2), initial.B)
    assert_bits(other, base)


@given(problems())
def test_both_factors_carry_the_same_share(t):
    W, r, alpha = t
    _, initial = pissa.init(W, r, alpha)
    rows, columns = (
        np.linalg.norm(M, axis=a) for M, a in ((initial.A, 1), (initial.B, 0))
    )
    # A row of A is a column of V times a root, and a column of B one of U times the
    # same root. The columns of U and V have norm 1 up to the error of the SVD; the two
    # products round once each.
    assert_within(rows, columns, gamma(2 * svd_roundings(W) + 2) * rows)


@given(rational_layers, st.data())
def test_the_conversion_is_the_same_function_over_the_rationals(t, data):
    # The law holds for any two adapters with the same scaling, not only for those of an
    # SVD.
    initial = LoRA(t.A, t.B, t.scaling)
    A, B = data.draw(rationals(t.A.shape)), data.draw(rationals(t.B.shape))
    trained = LoRA(A, B, t.scaling)
    base = pissa.residual(t.W, initial)
    plain = pissa.to_lora(trained, initial)
    assert len(plain.A) == 2 * len(t.A)
    assert np.all(lora.merge(base, initial) == t.W)
    assert np.all(lora.merge(t.W, plain) == lora.merge(base, trained))
    split = lora.forward(t.x, base, trained, t.bias)
    assert np.all(lora.forward(t.x, t.W, plain, t.bias) == split)


@given(problems(), seeds)
def test_before_training_the_conversion_changes_nothing_but_the_last_bits(t, seed):
    W, r, alpha = t
    _, initial = pissa.init(W, r, alpha)
    plain = pissa.to_lora(initial, initial)
    x = np.random.default_rng(seed).standard_normal((3, W.shape[1])).astype(np.float32)
    # The two halves of the adapter cancel; the roundings of both results remain.
    sizes = lora.LoRA(counted(plain.A), counted(plain.B), plain.scaling)
    formulas = (
        lora.forward(counted(x), counted(W), sizes),
        linear.forward(counted(x), counted(W)),
    )
    adapted, alone = lora.forward(x, W, plain), linear.forward(x, W)
    assert_both_within(adapted, alone, *formulas)


def test_the_residual_and_the_adapter_do_not_give_the_bits_back():
    # So a layer must keep W: peft's unload returns the residual of PiSSA, and even
    # residual + adapter differs from W in its last bits.
    W = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    base, initial = pissa.init(W, 8, 16)
    given_back = lora.merge(base, initial)
    assert np.any(given_back != W)
    assert norm(base - W) > norm(given_back - W) * 1e4


@given(problems(), seeds)
def test_the_randomized_split_is_exact_too_and_reproducible(t, seed):
    W, r, alpha = t
    sketch = pissa.Sketch(seed, oversampling=2, iterations=1)
    base, initial = pissa.init_randomized(W, r, alpha, sketch)
    again, repeated = pissa.init_randomized(W, r, alpha, sketch)
    assert_bits(base, again)
    assert_bits(initial.A, repeated.A)
    assert_bits(initial.B, repeated.B)
    assert_within(lora.merge(base, initial), W, there_and_back(W, base, initial))


@given(problems(), seeds)
def test_the_randomized_start_lies_between_nothing_and_the_best(t, seed):
    W, r, alpha = t
    best = norm(pissa.init(W, r, alpha)[0])
    sketch = pissa.Sketch(seed, oversampling=0, iterations=0)
    residual = norm(pissa.init_randomized(W, r, alpha, sketch)[0])
    # The residual is a projection of W, so its norm is at most that of W; Eckart-Young
    # gives the lower bound.
    assert best - rounding(W) <= residual <= norm(W) + rounding(W)


@given(problems())
def test_with_every_direction_sampled_the_randomized_svd_is_the_exact_one(t):
    W, r, alpha = t
    sketch = pissa.Sketch(oversampling=min(W.shape))
    best = norm(pissa.init(W, r, alpha)[0])
    residual = norm(pissa.init_randomized(W, r, alpha, sketch)[0])
    assert abs(residual - best) <= 2 * rounding(W)


@given(seeds)
def test_a_weight_of_low_rank_is_found_whole(seed):
    rng = np.random.default_rng(seed)
    W = (rng.standard_normal((30, 4)) @ rng.standard_normal((4, 20))).astype(np.float32)
    base, _ = pissa.init_randomized(W, 4, 8, pissa.Sketch(iterations=0))
    assert norm(base) <= 2 * rounding(W)


def test_iterations_pay_where_singular_values_decay_slowly():
    rng = np.random.default_rng(1)
    U, V = (np.linalg.qr(rng.standard_normal((n, 60))).Q for n in (90, 60))
    W = (U * np.arange(1, 61) ** -0.5 @ V.T).astype(np.float32)
    best = norm(pissa.init(W, 8, 16)[0])
    excess = [
        norm(pissa.init_randomized(W, 8, 16, pissa.Sketch(0, 0, n))[0]) / best - 1
        for n in (0, 1, 4, 16)
    ]
    assert excess == sorted(excess, reverse=True)
    assert excess[0] > 100 * excess[-1] > -rounding(W)


@given(st.data())
def test_sixteen_bits_are_split_in_thirty_two(data):
    W = data.draw(gaussians((6, 5))).astype(np.float16)
    base, initial = pissa.init(W, 2, 8)
    assert initial.A.dtype == initial.B.dtype == base.dtype == np.float32


def test_another_scaling_cannot_be_converted():
    _, initial = pissa.init(np.ones((5, 3), np.float32), 2, 8)
    with pytest.raises(InputError, match=r"scaling is 1.0 after training and 4.0"):
        pissa.to_lora(replace(initial, scaling=1.0), initial)
