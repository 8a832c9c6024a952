"""All optimizer states, in the form in which the laws of their kind use them.

A new row adds one entry: how to store the states of several tensors, how to take a step
for one of them, and what may happen between two steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from minipeft.reference import adamw, paged
from minipeft.reference.adamw import AdamW
from tests.tolerance import assert_bits

SETTINGS = st.builds(
    AdamW,
    lr=st.sampled_from([1e-3, 0.02, 1.0]),
    betas=st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.99)]),
    eps=st.sampled_from([1e-8, 1e-4]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.3]),
)
bits = st.sampled_from([8, 32])
dtypes = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16])
page_sizes = st.sampled_from([256, 512, 1024, 8192])
budgets = st.integers(1, 9)
SHAPES = [(17, 31), (64, 66), (5,)]  # 8 bits need at least 4,096 values


@dataclass(frozen=True)
class OptimizerState:
    """One row; `state` reads the state of a tensor from the result of `hold`."""

    name: str
    hold: Callable[[Any, list[adamw.State]], Any]
    step: Callable[[Any, int, np.ndarray, np.ndarray, AdamW], tuple[np.ndarray, Any]]
    state: Callable[[Any, int], adamw.State]
    between: Callable[[Any, Any], Any]


def _step_of_adamw(held, i, W, grad, config):
    W, state = adamw.step(W, grad, held[i], config)
    return W, (*held[:i], state, *held[i + 1 :])


def _move_pages(draw, p):
    for _ in range(draw(st.integers(0, 3))):
        verb = draw(st.sampled_from([paged.touch, paged.prefetch, paged.evict]))
        p = verb(p, draw(st.integers(0, len(p.host) - 1)))
    return paged.resize(p, draw(budgets))


ROWS = (
    OptimizerState(
        name="adamw",
        hold=lambda draw, states: tuple(states),
        step=_step_of_adamw,
        state=lambda held, i: held[i],
        between=lambda draw, held: held,
    ),
    OptimizerState(
        name="paged",
        hold=lambda draw, states: paged.init(states, draw(page_sizes), draw(budgets)),
        step=paged.step,
        state=paged.gather,
        between=_move_pages,
    ),
)


def weights(rng, dtype=np.float32):
    return [rng.standard_normal(shape).astype(dtype) for shape in SHAPES]


def gradient(rng, W):
    """Return values that spread over five decades."""
    decades = 10.0 ** rng.uniform(-4, 1, W.shape)
    return (rng.standard_normal(W.shape) * decades).astype(W.dtype)


def steps(draw):
    """Return which tensor takes each of several steps."""
    return draw(st.lists(st.integers(0, len(SHAPES) - 1), min_size=1, max_size=6))


def assert_same(a, b):
    """Check that two states are equal, bit for bit."""
    first, second = adamw.to_arrays(a), adamw.to_arrays(b)
    assert first.keys() == second.keys()
    for name in first:
        assert_bits(first[name], second[name])
