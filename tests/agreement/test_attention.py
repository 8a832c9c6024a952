"""The torch column's attention agrees with the reference: bits, a bound, gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import attention as reference
from minipeft.torch import attention
from tests.properties.test_attention import heads, rounding
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_within


def on_torch(head, requires_grad=False):
    """Return the same head with tensors."""
    tensors = [torch.from_numpy(a.copy()) for a in (head.Q, head.K, head.V)]
    mask = None if head.mask is None else torch.from_numpy(head.mask)
    return attention.Head(*(t.requires_grad_(requires_grad) for t in tensors), mask)


@given(heads())
def test_weights_agree(head):
    P = reference.weights(head)
    assert_within(attention.weights(on_torch(head)).numpy(), P, rounding(head) * P)


@given(seeds, st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 5))
def test_equal_shares_agree_bit_for_bit(seed, keys, d):
    rng = np.random.default_rng(seed)
    K, V = rng.integers(-8, 9, (2, keys, d)).astype(np.float32)
    head = reference.Head(np.zeros((3, d), np.float32), K, V)
    assert_bits(attention.forward(on_torch(head)).numpy(), reference.forward(head))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (2, 4), (3, 3)])
def test_the_causal_mask_agrees(queries, keys):
    ours = attention.causal(queries, keys).numpy()
    assert_bits(ours, reference.causal(queries, keys))


def test_the_same_input_is_refused():
    with pytest.raises(InputError, match="3 queries and 2 keys"):
        attention.causal(3, 2)
    Q = torch.ones(2, 3)
    mask = torch.tensor([[True, True], [False, False]])
    for function in (attention.forward, attention.weights):
        with pytest.raises(InputError, match="query 1 may look at no key"):
            function(attention.Head(Q, Q, Q, mask))
