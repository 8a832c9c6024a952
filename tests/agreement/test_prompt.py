"""The torch column's soft prompt: the bits of the reference, and laws on a Llama."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import prompt as reference
from minipeft.torch import prompt
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.virtual import IGNORE
from tests.agreement.llama import TEXT, llama, logit_bound
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_within

batches = st.sampled_from([(), (3,), (2, 2)])


@given(seeds, batches)
def test_gradients_agree_bit_for_bit(seed, batch):
    rng = np.random.default_rng(seed)
    X = torch.zeros(*batch, 4, 3, requires_grad=True)
    P = torch.zeros(2, 3, requires_grad=True)
    y = prompt.forward(X, prompt.Prompt(P))
    grad_y = rng.integers(-8, 9, y.shape).astype(np.float32)  # their sums are exact
    y.backward(torch.from_numpy(grad_y))
    grads = reference.backward(grad_y, reference.Prompt(P.detach().numpy()))
    assert_bits(X.grad.numpy(), np.ascontiguousarray(grads.X))
    assert_bits(P.grad.numpy(), grads.P)


@given(seeds, st.lists(st.integers(0, 8), min_size=1, max_size=5))
def test_the_start_agrees_bit_for_bit(seed, tokens):
    E = np.random.default_rng(seed).standard_normal((9, 3)).astype(np.float32)
    ours = prompt.init(torch.from_numpy(E), torch.tensor(tokens))
    assert_bits(ours.P.numpy(), reference.init(E, np.array(tokens)).P)


def test_a_prompt_made_of_a_text_is_that_text():
    model = llama()
    before, after = TEXT[:, :5], TEXT[:, 5:]
    adapted = PromptModel(model, PromptConfig(tokens=before[0].tolist()))
    with torch.no_grad():
        whole = model(torch.cat([before[:1].expand(2, -1), after], 1)).logits[:, 5:]
        assert_within(adapted(after).logits, whole, logit_bound(model, whole))


def test_the_loss_is_that_of_the_text():
    model = llama()
    adapted = PromptModel(model, PromptConfig(tokens=[5, 6, 7]))
    mask = torch.ones_like(TEXT)
    mask[:, -2:] = 0
    labels = TEXT.masked_fill(mask == 0, IGNORE)
    with torch.no_grad():
        out = adapted(TEXT, mask, labels)
        # With a prompt the loss covers the same tokens, and the first one is left out.
        logits = adapted(TEXT[:, :-2]).logits[:, :-1]
        predicted = TEXT[:, 1:-2].flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), predicted)
    assert out.logits.shape[:2] == TEXT.shape
    bound = 2 * float(logit_bound(model, out.logits).max())
    assert_within(float(out.loss), float(loss), bound)


def test_only_the_prompt_is_trained():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    adapted = PromptModel(model, PromptConfig(num_virtual_tokens=3))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(3, 32)]
    optimizer = torch.optim.SGD(trained, lr=5)
    losses = []
    for _ in range(6):
        loss = adapted(TEXT, labels=TEXT).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_generation_goes_on_from_the_prompt():
    model = llama()
    before, after = TEXT[:1, :5], TEXT[:1, 5:]
    adapted = PromptModel(model, PromptConfig(tokens=before[0].tolist()))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ours = adapted.generate(after, **settings)
    whole = torch.cat([before, after], 1)
    hard = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
    assert ours.tolist() == hard[:, 5:].tolist()


def test_a_random_start_is_that_of_its_seed():
    starts = [
        PromptModel(llama(), PromptConfig(4, seed=seed)).P.detach().numpy()
        for seed in (1, 1, 2)
    ]
    assert_bits(starts[0], starts[1])
    assert np.any(starts[0] != starts[2])
    assert np.abs(starts[0]).max() <= 0.5


def test_the_same_input_is_refused():
    E = torch.ones(4, 3)
    with pytest.raises(InputError, match="no token"):
        prompt.init(E, torch.tensor([], dtype=torch.int64))
    with pytest.raises(InputError, match="token 4 is not in the vocabulary"):
        prompt.init(E, torch.tensor([0, 4]))
    with pytest.raises(InputError, match="num_virtual_tokens is 0"):
        PromptConfig(0)
