"""Laws of LoftQ: its error, the descent of the error, the scaling, and the bit plan."""

from itertools import islice, pairwise
from math import ceil, sqrt

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minipeft.reference import blockwise, loftq, lora
from minipeft.reference.codebook import NF2, NF3, NF4
from tests.strategies import seeds
from tests.tolerance import assert_bits, gamma, svd_roundings

codebooks = st.sampled_from([NF4, NF3, NF2])
ranks = st.integers(1, 6)


@st.composite
def matrices(draw):
    d, k = draw(st.integers(6, 30)), draw(st.integers(6, 30))
    rng = np.random.default_rng(draw(seeds))
    W = rng.standard_normal((d, k))
    if draw(st.booleans()):  # a part of low rank, as in trained weights
        W += 3 * rng.standard_normal((d, 1)) @ rng.standard_normal((1, k))
    if draw(st.booleans()):
        W[rng.integers(d), rng.integers(k)] *= 30
    return W.astype(np.float32)


def plain_error(W, codebook):
    q = blockwise.quantize(W, codebook, 16)
    return float(np.linalg.norm(W - blockwise.dequantize(q)))


def slack(W, r):
    """Bound the difference of two errors |W - Q - s B A| that float32 computes."""
    # The norm has W.size squares and their sum; the root halves the relative error.
    norm = W.size // 2 + 2
    # The update has r products and the scaling, and each factor has two roots and a
    # product. The sum of its absolute terms is at most sqrt(r) times its norm.
    update = ceil(sqrt(r) * (r + 7))
    # Then come two differences of matrices. Both sides have all these roundings.
    side = svd_roundings(W) + norm + update + 2
    return gamma(2 * side) * float(np.linalg.norm(W))


@given(matrices(), ranks, codebooks)
def test_more_steps_never_make_it_worse(W, r, codebook):
    errors = [
        loftq.error(W, *loftq.init(W, r, 2 * r, codebook, 16, steps))
        for steps in (1, 2, 4)
    ]
    assert all(after <= before for before, after in pairwise(errors))


@given(matrices(), ranks, codebooks)
def test_one_step_is_at_least_as_good_as_quantizing(W, r, codebook):
    found = loftq.init(W, r, 2 * r, codebook, 16, steps=1)
    assert loftq.error(W, *found) <= plain_error(W, codebook) + slack(W, r)


def test_forgetting_a_scaling_of_two_wins_nothing():
    W = np.random.default_rng(0).standard_normal((48, 40)).astype(np.float32)
    q, initial = loftq.init(W, 8, 8, steps=1)
    forgotten = lora.LoRA(initial.A, initial.B, 2.0)
    plain = float(np.linalg.norm(W - blockwise.dequantize(blockwise.quantize(W))))
    # The residual is R = sum of s_i u_i v_i. Subtracting 2 B A turns the largest s_i
    # into -s_i, so the norm stays.
    assert abs(loftq.error(W, q, forgotten) - plain) <= slack(W, 4 * 8)
    honoured = loftq.init(W, 8, 16, steps=1)
    assert loftq.error(W, *honoured) < 0.9 * plain


def test_an_alternation_may_raise_the_error_and_the_best_one_is_kept():
    rising = 0
    for seed in range(30):
        W = np.random.default_rng(seed).standard_normal((6, 16)).astype(np.float32)
        raw = [loftq.error(W, *p) for p in islice(loftq.alternate(W, 2, 4, NF2, 16), 5)]
        rising += any(b > a + slack(W, 2) for a, b in pairwise(raw))
        assert loftq.error(W, *loftq.init(W, 2, 4, NF2, 16, steps=5)) == min(raw)
    assert rising > 0


@given(matrices(), ranks, codebooks)
def test_the_adapter_is_the_best_answer_to_its_own_base(W, r, codebook):
    q, initial = loftq.init(W, r, 3 * r, codebook, 16)
    rest = (W - blockwise.dequantize(q)).astype(np.float64)
    S = np.linalg.svd(rest, compute_uv=False)
    best = float(np.sqrt(np.square(S[r:]).sum()))
    assert abs(loftq.error(W, q, initial) - best) <= slack(W, r)


@given(matrices(), codebooks)
def test_the_base_is_a_quantized_tensor_like_any_other(W, codebook):
    q, _ = loftq.init(W, 2, 8, codebook, 16)
    again = blockwise.quantize(blockwise.dequantize(q), codebook, 16)
    assert_bits(again.packed, q.packed)
    assert q.shape == W.shape


@given(matrices())
def test_a_weight_that_the_codes_hold_needs_no_adapter(W):
    W = blockwise.dequantize(blockwise.quantize(W, NF4, 16))
    q, initial = loftq.init(W, 2, 8, NF4, 16)
    assert_bits(blockwise.dequantize(q), W)
    assert not np.any(lora.delta(initial))


def layers(seed, count=6):
    """Return layers of one size; each one is harder to quantize than the one before."""
    rng = np.random.default_rng(seed)
    return {
        f"layer{i}": (rng.standard_normal((16, 16)) * 2**i).astype(np.float32)
        for i in range(count)
    }


@given(seeds, st.floats(2, 4))
def test_the_plan_stays_within_its_bits(seed, mean_bits):
    weights = layers(seed)
    bits = loftq.plan(weights, mean_bits)
    assert set(bits) == set(weights)
    assert set(bits.values()) <= {2, 4}
    spent = sum(bits[n] * W.size for n, W in weights.items())
    assert spent <= mean_bits * sum(W.size for W in weights.values())


@given(seeds)
def test_more_bits_never_take_bits_from_a_layer(seed):
    weights = layers(seed)
    plans = [loftq.plan(weights, b) for b in (2, 3, 4)]
    for fewer, more in pairwise(plans):
        assert all(fewer[name] <= more[name] for name in weights)
    assert set(plans[0].values()) == {2}
    assert set(plans[-1].values()) == {4}


def test_four_bits_go_where_they_help_most():
    assert loftq.plan(layers(0), 3) == {f"layer{i}": 2 + 2 * (i >= 3) for i in range(6)}
