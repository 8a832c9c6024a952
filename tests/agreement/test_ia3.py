"""The torch column's IA3 in models: both sides, and several adapters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.errors import InputError
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import (
    activate,
    adapted,
    add,
    inject,
    trainable_parameters,
)
from tests.agreement.llama import llama

TARGETS = ["k_proj", "v_proj", "down_proj"]


def test_a_llama_scales_keys_values_and_what_comes_from_the_nonlinearity():
    model = llama()
    inject(model, IA3Config(feedforward=["down_proj"]), TARGETS)
    config = model.config
    heads = config.hidden_size // config.num_attention_heads
    per_layer = 2 * heads * config.num_key_value_heads + config.intermediate_size
    count = sum(p.numel() for p in trainable_parameters(model))
    assert count == config.num_hidden_layers * per_layer
    for name, layer in adapted(model).items():
        expected_side = "input" if name.endswith("down_proj") else "output"
        assert layer.adapters["default"].side == expected_side


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
