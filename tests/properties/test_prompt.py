"""Laws of prompt tuning: the soft prompt comes before the text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import prompt
from minipeft.reference.prompt import Prompt
from tests.exact import assert_gradients
from tests.strategies import rationals, seeds
from tests.tolerance import assert_bits


@st.composite
def texts(draw):
    """Draw an embedded text of fractions and a soft prompt for it."""
    batch = draw(st.sampled_from([(), (3,), (2, 2)]))
    n, tokens, d = (draw(st.integers(1, 4)) for _ in range(3))
    X = draw(rationals((*batch, tokens, d)))
    return X, Prompt(draw(rationals((n, d))))


@given(seeds, st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_a_prompt_of_real_tokens_is_that_text_bit_for_bit(seed, tokens):
    rng = np.random.default_rng(seed)
    E = rng.standard_normal((9, 3)).astype(np.float32)
    text = rng.integers(0, 9, (2, 4))
    hard = np.concatenate([np.tile(tokens, (2, 1)), text], axis=1)
    soft = prompt.forward(E[text], prompt.init(E, np.array(tokens)))
    assert_bits(soft, E[hard])


def test_training_the_prompt_never_touches_the_table():
    E = np.ones((4, 3), np.float32)
    prompt.init(E, np.array([1, 2])).P[:] = 5
    assert_bits(E, np.ones((4, 3), np.float32))


@given(texts(), st.data())
def test_gradients_are_exact_differences_over_the_rationals(t, data):
    X, p = t
    grad_y = data.draw(rationals(prompt.forward(X, p).shape))
    grads = prompt.backward(grad_y, p)

    def loss(X, P):
        return (grad_y * prompt.forward(X, Prompt(P))).sum()

    assert_gradients(loss, (X, p.P), grads, data)


@given(texts())
def test_every_text_of_a_batch_gets_the_same_prompt(t):
    X, p = t
    y = prompt.forward(X, p)
    n = len(p.P)
    assert y.shape == (*X.shape[:-2], n + X.shape[-2], X.shape[-1])
    assert np.all(y[..., :n, :] == p.P)
    assert np.all(y[..., n:, :] == X)


def test_a_random_start_stays_in_the_cube():
    P = prompt.init_random(np.random.default_rng(0), 40, 30).P
    assert P.shape == (40, 30)
    assert P.dtype == np.float32
    assert 0.45 < np.abs(P).max() <= 0.5


@pytest.mark.parametrize(
    ("tokens", "sentence"), [([0, 4], "token 4"), ([-1], "token -1")]
)
def test_a_token_that_does_not_exist_is_named(tokens, sentence):
    E = np.ones((4, 3), np.float32)
    with pytest.raises(InputError, match=f"{sentence} is not in the vocabulary"):
        prompt.init(E, np.array(tokens))


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="no token"):
        prompt.init(np.ones((4, 3), np.float32), np.array([], np.int64))
    with pytest.raises(InputError, match="num_virtual_tokens is 0"):
        prompt.init_random(np.random.default_rng(0), 0, 3)
