"""The torch column's VeRA: one random pair in every column and for every layer."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.errors import InputError
from minipeft.reference import vera as reference
from minipeft.torch import vera
from minipeft.torch.inject import (
    adapted,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    trainable_parameters,
)
from minipeft.torch.vera import Projections, VeRAConfig
from tests.agreement.llama import llama
from tests.strategies import seeds
from tests.tolerance import assert_bits


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_the_pair_is_the_references_bit_for_bit(seed, r, in_features, out_features):
    ours = vera.projections(seed, r, in_features, out_features)
    expected = reference.projections(seed, r, in_features, out_features)
    assert_bits(ours[0].numpy(), expected.A)
    assert_bits(ours[1].numpy(), expected.B)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1])
@pytest.mark.parametrize("sizes", [(4, 9, 5), (16, 64, 48), (256, 130, 257)])
def test_the_pair_is_pefts_bit_for_bit(seed, sizes):
    model = pytest.importorskip("peft.tuners.vera.model", reason="needs peft")
    r, in_features, out_features = sizes
    stream = torch.Generator("cpu").manual_seed(seed)
    A = model._kaiming_init((r, in_features), stream)
    B = model._kaiming_init((out_features, r), stream)
    ours = reference.projections(seed, r, in_features, out_features)
    assert_bits(ours.A, A.numpy())
    assert_bits(ours.B, B.numpy())


def test_a_model_gets_the_pair_that_peft_gives_it():
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7))
    config = peft.VeraConfig(r=5, projection_prng_key=3, target_modules=["0", "1"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    inject(model, VeRAConfig(r=5, seed=3), ["0", "1"])
    pair = model[0].adapters["default"].projections
    assert_bits(pair.A.numpy(), theirs.base_model.vera_A["default"].detach().numpy())
    assert_bits(pair.B.numpy(), theirs.base_model.vera_B["default"].detach().numpy())
    ours = sum(p.numel() for p in trainable_parameters(model))
    assert ours == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_one_pair_serves_every_layer_wherever_it_goes():
    model = llama()
    inject(model, VeRAConfig(r=8), ["q_proj", "v_proj", "down_proj"])
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        pairs = {id(a.adapters["default"].projections) for a in adapted(moved).values()}
        assert len(pairs) == 1
    trained = trainable_parameters(model)
    layers = len(adapted(model))
    rows = sum(a.W.shape[0] for a in adapted(model).values())
    assert sum(p.numel() for p in trained) == 8 * layers + rows
    assert not any(key.endswith(("A", "B")) for key in adapter_state_dict(model))


def test_a_pair_that_was_given_is_not_saved_either():
    pair = Projections.given(torch.ones(3, 8), torch.ones(5, 3))
    assert {name for name, _ in pair.named_buffers()} == {"A", "B"}
    assert not pair.state_dict()
    assert pair.drawn == (-1, 3, 8, 5)  # by no seed


def test_a_state_dict_brings_its_own_pair():
    saved, loaded = (nn.Sequential(nn.Linear(6, 9)) for _ in range(2))
    loaded.load_state_dict(saved.state_dict())
    inject(saved, VeRAConfig(r=3, seed=7), ["0"])
    with torch.no_grad():
        saved[0].adapters["default"].b.fill_(2.0)
    x = torch.randn(4, 6)
    inject(loaded, VeRAConfig(r=3, seed=8), ["0"])
    load_adapter_state_dict(loaded, adapter_state_dict(saved))
    assert torch.equal(loaded(x), saved(x))
    inject(again := nn.Sequential(nn.Linear(6, 9)), VeRAConfig(r=3, seed=9), ["0"])
    again.load_state_dict(saved.state_dict())
    assert torch.equal(again(x), saved(x))
    assert torch.equal(copy.deepcopy(again)(x), saved(x))


def test_a_pair_that_was_drawn_for_smaller_layers_is_refused():
    model = inject(nn.Sequential(nn.Linear(6, 9)), VeRAConfig(r=3), ["0"])
    state = {**adapter_state_dict(model), "0.drawn": torch.tensor([0, 3, 5, 9])}
    with pytest.raises(InputError, match="drawn: in_features is 5; choose 6 or more"):
        load_adapter_state_dict(model, state)
    model[0].adapters["default"].projections.draw((0, 3, 5, 9), torch.device("cpu"))
    with pytest.raises(InputError, match=r"up to \(9, 5\).*here \(9, 6\)"):
        model(torch.ones(6))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (VeRAConfig(r=0), "r is 0"),
        (VeRAConfig(seed=-1), "seed is -1"),
        (VeRAConfig(dropout=1.0), "dropout is 1.0"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_changes(config, sentence):
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(InputError, match=sentence):
        inject(model, config, ["0"])
    assert isinstance(model[0], nn.Linear)
