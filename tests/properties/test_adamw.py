"""Laws of AdamW alone: its formula, its symmetries, its 8-bit states."""

from math import sqrt

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import adamw, blockwise
from minipeft.reference.adamw import MIN_8BIT_SIZE, AdamW
from tests.bounds import Counted, bound
from tests.states import SETTINGS, assert_same, bits
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_within, gamma

half_dtypes = st.sampled_from([np.float16, ml_dtypes.bfloat16])


def tensors(seed, k, size=MIN_8BIT_SIZE + 100):
    """A weight and k gradients that spread over five decades."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal(size).astype(np.float32)
    decades = 10.0 ** rng.uniform(-4, 1, size)
    grads = (rng.standard_normal((k, size)) * decades).astype(np.float32)
    return W, list(grads)


def run(W, grads, config, state):
    for grad in grads:
        W, state = adamw.step(W, grad, state, config)
    return W, state


@given(seeds, SETTINGS, st.integers(1, 5), bits)
def test_a_step_follows_the_formula(seed, config, k, b):
    k = 1 if b == 8 else k  # with zero moments, both encodings start alike
    W, grads = tensors(seed, k)
    before, state = run(W, grads[:-1], config, adamw.init(W, b))
    after, _ = adamw.step(before, grads[-1], state, config)

    m = v = np.zeros(W.size)
    (beta1, beta2), lr = config.betas, config.lr
    sizes = Counted(m), Counted(v)
    for t, g in enumerate((g.astype(np.float64) for g in grads), 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        *sizes, reach = counted_step(abs(before), abs(g), *sizes, t, config)
    scale = lr / (1 - beta1**k) / (np.sqrt(v / (1 - beta2**k)) + config.eps)
    decayed = (1 - lr * config.weight_decay) * before.astype(np.float64)
    assert_within(after, decayed - scale * m, bound(reach))


def counted_step(W, g, m, v, t, config):
    """Return a step on counted values; each setting is rounded to float32 once."""
    (beta1, beta2), lr = config.betas, config.lr
    W, g = (Counted(size.astype(np.float64)) for size in (W, g))
    m = m + (g - m) * Counted(1 - beta1, 1)
    v = v * Counted(beta2, 1) + g * g * Counted(1 - beta2, 1)
    root = np.sqrt(v) / Counted(sqrt(1 - beta2**t), 1) + Counted(config.eps, 1)
    moved = m * Counted(lr / (1 - beta1**t), 1) / root
    return m, v, W * Counted(1 - lr * config.weight_decay, 1) - moved


@given(seeds, SETTINGS, bits)
def test_a_step_is_the_same_in_eight_bits_up_to_what_the_state_lost(seed, config, b):
    # One step from a given state depends on the decoded state, not on its encoding.
    W, grads = tensors(seed, 3)
    _, state = run(W, grads[:2], config, adamw.init(W, b))
    spelled_out = adamw.State(state.t, adamw.decode(state.m), adamw.decode(state.v))
    coded, coded_state = adamw.step(W, grads[2], state, config)
    plain, plain_state = adamw.step(W, grads[2], spelled_out, config)
    assert_bits(coded, plain)
    for after, before, m in (
        (coded_state.m, plain_state.m, state.m),
        (coded_state.v, plain_state.v, state.v),
    ):
        assert_bits(adamw.decode(after), adamw.decode(adamw.encode(before, m)))


@given(seeds, st.integers(1, 6), st.sampled_from([-10, -3, 5, 12]), bits)
def test_the_size_of_the_gradient_does_not_matter_without_eps(seed, k, power, b):
    config = AdamW(lr=0.02, eps=0.0, weight_decay=0.0)
    W, grads = tensors(seed, k)
    scaled = [g * np.float32(2.0**power) for g in grads]
    expected, _ = run(W, grads[:1], config, adamw.init(W, b))
    actual, _ = run(W, scaled[:1], config, adamw.init(W, b))
    assert_bits(actual, expected)
    if b == 32:  # an 8-bit v may be zero: 0 / 0 is left out
        expected, _ = run(W, grads, config, adamw.init(W))
        assert_bits(run(W, scaled, config, adamw.init(W))[0], expected)


@given(seeds, SETTINGS, st.integers(1, 6))
def test_mirrored_weights_and_gradients_give_mirrored_weights(seed, config, k):
    W, grads = tensors(seed, k, 200)
    there, _ = run(W, grads, config, adamw.init(W))
    mirrored, _ = run(-W, [-g for g in grads], config, adamw.init(W))
    assert_bits(mirrored, -there)


@given(seeds, SETTINGS, st.integers(1, 6), bits)
def test_without_gradient_a_weight_only_decays(seed, config, k, b):
    # Half of the gradients are exactly zero, in blocks with other values. With a map
    # that has no code for zero (bitsandbytes on a CPU) these weights change.
    W, grads = tensors(seed, k)
    for g in grads:
        g[::2] = 0
    moved, state = run(W, grads, config, adamw.init(W, b))
    decayed = W
    for _ in grads:
        decayed = decayed * np.float32(1 - config.lr * config.weight_decay)
    assert_bits(moved[::2], decayed[::2])
    assert not adamw.decode(state.m)[::2].any()
    assert not adamw.decode(state.v)[::2].any()


@given(seeds, SETTINGS, st.integers(1, 4))
def test_blocks_of_the_state_know_nothing_of_each_other(seed, config, k):
    size = 32 * 256
    W, grads = tensors(seed, k, size)
    order = np.random.default_rng(seed).permutation(32)

    def shuffled(x):
        return x.reshape(32, 256)[order].reshape(-1)

    moved, _ = run(W, grads, config, adamw.init(W, 8))
    other = run(shuffled(W), map(shuffled, grads), config, adamw.init(W, 8))
    assert_bits(other[0], shuffled(moved))


@given(seeds, SETTINGS, bits, half_dtypes, st.integers(1, 4))
def test_a_weight_of_16_bits_is_rounded_once_a_step(seed, config, b, dtype, k):
    W, grads = tensors(seed, k)
    W, grads = W.astype(dtype), [g.astype(dtype) for g in grads]
    state = expected_state = adamw.init(W, b)
    for grad in grads:
        exact = W.astype(np.float32), grad.astype(np.float32)
        W, state = adamw.step(W, grad, state, config)
        expected, expected_state = adamw.step(*exact, expected_state, config)
        assert_bits(W, expected.astype(dtype))
        assert_same(state, expected_state)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_over_weights_of_16_bits_the_second_moment_keeps_its_digits(dtype):
    # A state in the dtype of the weight, as in torch's AdamW, loses this: a thousandth
    # of a square is soon less than the last bit of v.
    W = np.zeros(4, dtype)
    state = adamw.init(W)
    assert state.m.dtype == state.v.dtype == np.float32
    for _ in range(100):
        W, state = adamw.step(W, np.ones_like(W), state, AdamW())
    # Five roundings a step: two settings, two products, one sum.
    assert_within(state.v, np.full(4, 1 - 0.999**100), gamma(5 * 100))


@pytest.mark.parametrize("size", [1, 255, MIN_8BIT_SIZE - 1])
def test_a_small_tensor_keeps_its_state_in_32_bits(size):
    W, grads = tensors(0, 3, size)
    small, expected = (run(W, grads, AdamW(), adamw.init(W, b)) for b in (8, 32))
    assert_bits(small[0], expected[0])
    assert_same(small[1], expected[1])


def test_eight_bits_take_two_bytes_a_parameter_and_a_64th():
    W = np.zeros(MIN_8BIT_SIZE, np.float32)
    state = adamw.init(W, 8)
    stored = sum(m.packed.nbytes + m.absmax.nbytes for m in (state.m, state.v))
    assert stored / W.size == 2 + 8 / 256
    assert isinstance(state.m, blockwise.Blockwise)
    assert adamw.decode(state.v).min() == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    W = np.zeros(5, np.float32)
    grad = np.array([0, 0, 0, bad, bad], np.float32)
    with pytest.raises(InputError, match=f"{bad} at index 3"):
        adamw.step(W, grad, adamw.init(W), AdamW())


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}]
)
def test_a_setting_out_of_range_is_refused(bad):
    (name,) = bad
    with pytest.raises(InputError, match=name):
        AdamW(**bad)
