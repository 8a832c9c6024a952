"""The torch column's IA3: bits, bounds, a merge undone even where l is 0."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.errors import InputError
from minipeft.reference import ia3 as reference
from minipeft.torch.ia3 import IA3, IA3Config, IA3Linear
from minipeft.torch.inject import (
    activate,
    adapted,
    add,
    inject,
    merge,
    trainable_parameters,
    unload,
    unmerge,
)
from tests.agreement.llama import TEXT, llama
from tests.properties.test_ia3 import rescaled
from tests.strategies import gaussian_layers, gaussians, integer_layers, integers
from tests.tolerance import assert_bits, assert_within, gamma

TARGETS = ["k_proj", "v_proj", "down_proj"]


def tensor(array):
    return torch.from_numpy(np.array(array))


def module(t, a):
    base = nn.Linear(*t.W.T.shape, bias=t.bias is not None)
    with torch.no_grad():
        base.weight.copy_(tensor(t.W))
        if t.bias is not None:
            base.bias.copy_(tensor(t.bias))
    return IA3Linear(base, IA3(tensor(a.l), a.side == "input"))


def run(t, layer):
    """Output, then the gradients of x and l."""
    leaf = tensor(t.x).requires_grad_()
    y = layer(leaf)
    y.backward(tensor(t.grad_y))
    return [
        y.detach().numpy(),
        leaf.grad.numpy(),
        layer.adapters["default"].l.grad.numpy(),
    ]


@given(rescaled(integer_layers, integers))
def test_values_and_gradients_agree_bit_for_bit(case):
    t, a = case
    layer = module(t, a)
    expected = [
        reference.forward(t.x, t.W, a, t.bias),
        *reference.backward(t.grad_y, t.x, t.W, a, t.bias),
    ]
    for ours, theirs in zip(run(t, layer), expected, strict=True):
        assert_bits(ours + 0, theirs + 0)  # plus zero: which zero depends on the order
    assert_bits(layer.merged().detach().numpy(), reference.merge(t.W, a))
    assert_bits(layer.merge()(tensor(t.x)).detach().numpy() + 0, expected[0] + 0)


@given(rescaled(integer_layers, integers))
def test_what_unload_returns_is_a_plain_layer(case):
    t, a = case
    expected = reference.forward(t.x, t.W, a, t.bias)
    plain = module(t, a).merge().unload()
    assert type(plain) is nn.Linear
    assert_bits(plain(tensor(t.x)).detach().numpy() + 0, expected + 0)
    before = module(t, a).merge().unmerge().unload()
    assert_bits(before.weight.detach().numpy(), t.W)
    if t.bias is not None:
        assert_bits(before.bias.detach().numpy(), t.bias)


@given(rescaled(gaussian_layers, gaussians))
def test_values_and_gradients_agree_within_a_bound(case):
    t, a = case
    absolute = reference.IA3(abs(a.l), a.side)
    bias = None if t.bias is None else abs(t.bias)
    expected = [
        reference.forward(t.x, t.W, a, t.bias),
        *reference.backward(t.grad_y, t.x, t.W, a, t.bias),
    ]
    bounds = [
        reference.forward(abs(t.x), abs(t.W), absolute, bias),
        *reference.backward(abs(t.grad_y), abs(t.x), abs(t.W), absolute, bias),
    ]
    roundings = sum(t.W.shape) + t.grad_y.size // len(t.W) + 4
    for ours, theirs, size in zip(run(t, module(t, a)), expected, bounds, strict=True):
        assert_within(ours, theirs, 2 * gamma(roundings) * size.astype(np.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_gives_every_bit_back_even_where_l_is_zero(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)).to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    inject(model, IA3Config(feedforward=["1"]), ["0", "1"])
    with torch.no_grad():
        for layer in model:
            layer.adapters["default"].l.normal_()
            layer.adapters["default"].l[::3] = 0
            layer.adapters["default"].l[1] = 1e-8
    x = torch.randn(3, 24, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    for _ in range(5):
        merge(model)
        assert not model[0].merged_weight[0].any()
        unmerge(model)
    assert torch.equal(model(x), y)
    for old, new in zip(before, unload(model).parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_llama_starts_unchanged_learns_and_merges():
    model = llama()
    expected = model(TEXT).logits
    inject(model, IA3Config(feedforward=["down_proj"]), TARGETS)
    assert torch.equal(model(TEXT).logits, expected)
    config = model.config
    heads = config.hidden_size // config.num_attention_heads
    per_layer = 2 * heads * config.num_key_value_heads + config.intermediate_size
    count = sum(p.numel() for p in trainable_parameters(model))
    assert count == config.num_hidden_layers * per_layer
    first = model(TEXT, labels=TEXT).loss
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()
    assert model(TEXT, labels=TEXT).loss < first
    sides = {
        name: a.adapters["default"].feedforward for name, a in adapted(model).items()
    }
    assert all(side == name.endswith("down_proj") for name, side in sides.items())
    plain = unload(merge(copy.deepcopy(model)))
    assert not adapted(plain)


@given(st.integers(0, 99))
def test_shares_add_what_each_adapter_changes(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 4))
    inject(model, IA3Config(), ["0"])
    add(model, IA3Config(), "other")
    first, second = (torch.randint(-8, 9, (4,)).float() for _ in range(2))
    with torch.no_grad():
        model[0].adapters["default"].l.copy_(first)
        model[0].adapters["other"].l.copy_(second)
        model[0].base.weight.copy_(torch.randint(-8, 9, (4, 6)))
    activate(model, {"default": 0.5, "other": -2.0})
    scale = 1 + 0.5 * (first - 1) - 2 * (second - 1)
    expected = scale[:, None] * model[0].base.weight
    assert torch.equal(model[0].merged(), expected)
    activate(model, {})
    assert torch.equal(model[0].merged(), model[0].base.weight)


def test_a_feedforward_layer_that_is_no_target_is_refused():
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(InputError, match=r"'down_proj' is none of the targets.* 0"):
        inject(model, IA3Config(feedforward=["down_proj"]), ["0"])


def test_the_input_of_an_embedding_cannot_be_scaled():
    model = nn.Sequential(nn.Embedding(6, 4))
    with pytest.raises(InputError, match=r"^0: the input of an embedding"):
        inject(model, IA3Config(feedforward=["0"]), ["0"])
