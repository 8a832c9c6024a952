"""The contract of every initializer, in both columns: a base and a LoRA for it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given

from minipeft.errors import InputError
from minipeft.reference import loftq, lora, pissa, qlora
from minipeft.torch import loftq as torch_loftq
from minipeft.torch import pissa as torch_pissa
from tests.properties.test_pissa import norm, problems, rounding


@dataclass(frozen=True)
class Initializer:
    """One row: a function of W, r and alpha in either column."""

    name: str
    reference: Callable
    torch: Callable


ROWS = (
    Initializer("pissa", pissa.init, torch_pissa.init),
    Initializer("pissa randomized", pissa.init_randomized, torch_pissa.init_randomized),
    Initializer(  # the second result may have other codes where rounding moved a weight
        "loftq",
        lambda W, r, alpha: loftq.init(W, r, alpha, steps=1),
        lambda W, r, alpha: torch_loftq.init(W, r, alpha, steps=1),
    ),
)
each = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def weight(base):
    """Return the base as an array, decoded if it is quantized."""
    return base if isinstance(base, np.ndarray) else qlora.dequantize(base)


@each
@given(t=problems())
def test_from_then_on_it_is_lora_of_that_rank_and_scaling(row, t):
    W, r, alpha = t
    base, adapter = row.reference(W, r, alpha)
    _, other = row.torch(torch.from_numpy(W), r, alpha)
    assert lora.merge(weight(base), adapter).shape == W.shape
    assert len(adapter.A) == len(other.A) == r
    assert adapter.scaling == other.scaling == alpha / r


@each
@given(t=problems())
def test_the_scaling_moves_the_factors_and_not_the_sum(row, t):
    # An initializer without the scaling leaves the error |W - Q| for s = 2, and a
    # larger error for a larger s. Such initializers have been published.
    W, r, alpha = t
    found = [row.reference(W, r, a) for a in (alpha, 3 * alpha)]
    one, other = (norm(lora.merge(weight(base), a) - W) for base, a in found)
    assert abs(one - other) <= 2 * rounding(W)


@each
def test_the_same_is_refused_in_the_same_words(row):
    W = np.ones((5, 3), np.float32)
    broken = W.copy()
    broken[3, 1] = np.nan
    cases = [(W, r, 8.0) for r in (0, -1, 4)]
    cases += [(W, 2, alpha) for alpha in (0.0, -2.0, np.nan)]
    for given_W, r, alpha in (*cases, (broken, 2, 8.0)):
        with pytest.raises(InputError) as theirs:
            row.reference(given_W, r, alpha)
        with pytest.raises(InputError) as ours:
            row.torch(torch.from_numpy(given_W), r, alpha)
        assert str(ours.value) == str(theirs.value)
