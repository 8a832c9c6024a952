"""The contract of every state of an optimizer, in the reference."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.reference import adamw
from tests.states import (
    ROWS,
    SETTINGS,
    assert_same,
    bits,
    dtypes,
    gradient,
    steps,
    weights,
)
from tests.strategies import seeds
from tests.tolerance import assert_bits

pytestmark = pytest.mark.slow

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@rows
@given(seeds, SETTINGS, bits, dtypes, st.data())
def test_each_tensor_takes_its_own_steps_whatever_is_between(
    row, seed, config, b, dtype, data
):
    rng, draw = np.random.default_rng(seed), data.draw
    W = weights(rng, dtype)
    alone, states = list(W), [adamw.init(w, b) for w in W]
    held = row.hold(draw, states)
    for i in steps(draw):
        grad = gradient(rng, W[i])
        W[i], held = row.step(held, i, W[i], grad, config)
        alone[i], states[i] = adamw.step(alone[i], grad, states[i], config)
        held = row.between(draw, held)
    for i, (ours, expected) in enumerate(zip(W, alone, strict=True)):
        assert_bits(ours, expected)
        assert_same(row.state(held, i), states[i])


@rows
@given(seeds, SETTINGS, bits, st.data())
def test_nothing_given_is_changed_over_several_steps(row, seed, config, b, data):
    rng, draw = np.random.default_rng(seed), data.draw
    W, kept = weights(rng), []
    held = row.hold(draw, [adamw.init(w, b) for w in W])
    for i in steps(draw):
        grad = gradient(rng, W[i])
        copies = W[i].copy(), grad.copy(), copied(row.state(held, i))
        kept.append(((W[i], grad, held, i), copies))
        W[i], held = row.step(held, i, W[i], grad, config)
        held = row.between(draw, held)
    for (w, grad, before, i), (w_copy, grad_copy, state_copy) in kept:
        assert_bits(w, w_copy)
        assert_bits(grad, grad_copy)
        assert_same(row.state(before, i), state_copy)


@rows
@given(seeds, SETTINGS, bits, st.data())
def test_saving_and_loading_between_two_steps_changes_nothing(
    row, seed, config, b, data
):
    rng, draw = np.random.default_rng(seed), data.draw
    W = weights(rng)
    whole, held = list(W), row.hold(draw, [adamw.init(w, b) for w in W])
    other = held
    for i in steps(draw):
        grad = gradient(rng, W[i])
        whole[i], held = row.step(held, i, whole[i], grad, config)
        W[i], other = row.step(other, i, W[i], grad, config)
        loaded = [copied(row.state(other, j)) for j in range(len(W))]
        other = row.hold(draw, loaded)  # in different pages, if the row has pages
    for i, (ours, expected) in enumerate(zip(W, whole, strict=True)):
        assert_bits(ours, expected)
        assert_same(row.state(other, i), row.state(held, i))


def copied(state):
    """Return the state after writing it to a file and reading it back."""
    file = io.BytesIO()
    np.savez(file, **adamw.to_arrays(state))
    file.seek(0)
    with np.load(file) as saved:
        return adamw.from_arrays(saved)
