"""The torch column's prefix: one head agrees with the reference; laws on a Llama."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given

from minipeft.errors import InputError
from minipeft.reference import prefix as reference
from minipeft.torch import prefix
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from tests.agreement.llama import TEXT, llama, logit_bound
from tests.agreement.test_attention import on_torch
from tests.bounds import bound, counted
from tests.properties.test_attention import heads, rounding
from tests.properties.test_prefix import counts, networks, prefix_for
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_within, gamma


def as_torch(p):
    return prefix.Prefix(torch.from_numpy(p.K), torch.from_numpy(p.V))


@given(heads(), counts, seeds)
def test_gate_agrees(head, count, seed):
    p = prefix_for(head, count, seed)
    gate = reference.gate(head, p)
    # Both gates add up `count` shares.
    bound = (rounding(reference.attach(head, p)) + 2 * gamma(count)) * gate
    assert_within(prefix.gate(on_torch(head), as_torch(p)).numpy(), gate, bound)


@given(networks())
def test_the_network_agrees(network):
    P, W_down, b_down, W_up, b_up = (
        torch.from_numpy(f.astype(np.float32)) for f in vars(network).values()
    )
    ours = prefix.Reparametrization(*P.shape, *W_up.T.shape)
    with torch.no_grad():
        ours.P.copy_(P)
        ours.down.weight.copy_(W_down), ours.down.bias.copy_(b_down)
        ours.up.weight.copy_(W_up), ours.up.bias.copy_(b_up)
        expanded = prefix.expand(ours)
    expected = reference.expand(network)
    # Each value of the network was rounded to float32 once.
    fields = (counted(f, roundings=1) for f in vars(network).values())
    formula = reference.expand(reference.Reparametrization(*fields))
    for name in ("K", "V"):
        found, right = getattr(expanded, name).numpy(), getattr(expected, name)
        allowed = bound(getattr(formula, name))
        assert_within(found, right, allowed + bound(getattr(formula, name), "float64"))


def test_a_prefix_made_of_a_text_is_that_text():
    model = llama()
    before, after = TEXT[:, :5], TEXT[:, 5:]
    adapted = PrefixModel(model, PrefixConfig(tokens=before[0].tolist()))
    with torch.no_grad():
        whole = model(torch.cat([before[:1].expand(2, -1), after], 1)).logits[:, 5:]
        assert_within(adapted(after).logits, whole, logit_bound(model, whole))


def test_padding_is_not_seen():
    model = llama()
    adapted = PrefixModel(model, PrefixConfig(num_virtual_tokens=3))
    mask = torch.ones_like(TEXT)
    mask[:, -2:] = 0
    with torch.no_grad():
        short = adapted(TEXT[:, :-2]).logits
        padded = adapted(TEXT, mask).logits[:, :-2]
    assert_within(padded, short, logit_bound(model, short))


@pytest.mark.parametrize("hidden", [0, 16])
def test_only_the_prefix_is_trained(hidden):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    adapted = PrefixModel(model, PrefixConfig(num_virtual_tokens=3, hidden=hidden))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(6):
        loss = adapted(TEXT, labels=TEXT).loss
        losses.append(float(loss.detach()))
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    layers, heads, d = 2, 2, 8
    direct = layers * 2 * heads * d * 3
    network = 3 * 32 + 16 * (32 + 1) + 2 * layers * heads * d * (16 + 1)
    assert sum(p.numel() for p in trained) == (network if hidden else direct)


def test_the_network_fills_every_head_of_every_layer():
    adapted = PrefixModel(llama(), PrefixConfig(num_virtual_tokens=3, hidden=16))
    layers, heads, d = adapted.sizes
    expanded, P = prefix.expand(adapted.network), adapted.prefix()
    for part in range(layers * heads):
        own = slice(part * d, (part + 1) * d)
        K, V = P[part // heads, :, part % heads]
        assert torch.equal(K, expanded.K[:, own])
        assert torch.equal(V, expanded.V[:, own])


def test_a_network_starts_with_weights_on_both_sides_and_no_bias():
    network = prefix.Reparametrization(3, d=16, hidden=24, both=40)
    for layer in (network.down, network.up):
        bound = layer.in_features**-0.5
        least, most = layer.weight.min().item(), layer.weight.max().item()
        assert -bound <= least < -bound / 2
        assert bound / 2 < most <= bound
        assert not layer.bias.any()


def test_the_network_is_dropped_without_a_trace():
    adapted = PrefixModel(llama(), PrefixConfig(num_virtual_tokens=3, hidden=16))
    with torch.no_grad():
        before = adapted(TEXT).logits
        adapted.drop_network()
        after = adapted(TEXT).logits
    assert_bits(after.numpy(), before.numpy())
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == ["P"]


def test_generation_goes_on_from_the_prefix():
    model = llama()
    before, after = TEXT[:1, :5], TEXT[:1, 5:]
    adapted = PrefixModel(model, PrefixConfig(tokens=before[0].tolist()))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ours = adapted.generate(after, **settings)
    whole = torch.cat([before, after], 1)
    hard = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
    assert ours.tolist() == hard[:, 5:].tolist()


def test_checkpointing_is_refused_rather_than_training_without_a_prefix():
    model = llama()
    adapted = PrefixModel(model, PrefixConfig(num_virtual_tokens=3)).train()
    model.activation_checkpointing_enable()
    with pytest.raises(InputError, match="switches off the cache"):
        adapted(TEXT, labels=TEXT)
    model.activation_checkpointing_disable()
    adapted(TEXT, labels=TEXT).loss.backward()
    assert adapted.P.grad.any()


def test_the_same_input_is_refused():
    with pytest.raises(InputError, match="num_virtual_tokens is 0"):
        PrefixConfig(num_virtual_tokens=0)
    with pytest.raises(InputError, match="hidden is 8, and a network does not start"):
        PrefixConfig(tokens=[1, 2], hidden=8)
    with pytest.raises(InputError, match="Linear is no causal language model"):
        PrefixModel(torch.nn.Linear(2, 2), PrefixConfig())
