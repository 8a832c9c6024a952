"""The torch column's VeRA: the same pair in every column, bits, bounds, one sharing."""

import copy

import numpy as np
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
    merge,
    trainable_parameters,
    unload,
    unmerge,
)
from minipeft.torch.vera import Projections, VeRA, VeRAConfig, VeRALinear
from tests.agreement.llama import TEXT, llama
from tests.strategies import gaussian_layers, gaussians, integer_layers, integers, seeds
from tests.tolerance import assert_bits, assert_within, gamma


def tensor(array):
    return torch.from_numpy(np.array(array))


def given_pair(A, B):
    pair = Projections(0, len(A), A.shape[1], len(B))
    pair.A, pair.B = tensor(A), tensor(B)
    return pair


@st.composite
def layers(draw, kind, vectors):
    """A layer as the reference sees it, and as a module."""
    t = draw(kind)
    v = reference.VeRA(draw(vectors((len(t.A),))), draw(vectors((len(t.W),))))
    if kind is integer_layers:
        v = reference.VeRA(np.sign(v.d), np.sign(v.b) * 2)  # sums below 2**24
    base = nn.Linear(*t.W.T.shape, bias=t.bias is not None)
    with torch.no_grad():
        base.weight.copy_(tensor(t.W))
        if t.bias is not None:
            base.bias.copy_(tensor(t.bias))
    adapter = VeRA(tensor(v.d), tensor(v.b), given_pair(t.A, t.B))
    return t, reference.Projections(t.A, t.B), v, VeRALinear(base, adapter)


def run(t, layer):
    """Output, then the gradients of x, d and b."""
    leaf = tensor(t.x).requires_grad_()
    y = layer(leaf)
    y.backward(tensor(t.grad_y))
    adapter = layer.adapters["default"]
    return [y.detach().numpy(), *(v.grad.numpy() for v in (leaf, adapter.d, adapter.b))]


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


@given(layers(integer_layers, integers))
def test_values_and_gradients_agree_bit_for_bit(case):
    t, pair, v, layer = case
    expected = [
        reference.forward(t.x, t.W, pair, v, t.bias),
        *reference.backward(t.grad_y, t.x, t.W, pair, v),
    ]
    for ours, theirs in zip(run(t, layer), expected, strict=True):
        assert_bits(ours + 0, theirs + 0)  # plus zero: which zero depends on the order
    merged = layer.merged().detach().numpy()
    assert_bits(merged + 0, reference.merge(t.W, pair, v) + 0)


@given(layers(gaussian_layers, gaussians))
def test_values_and_gradients_agree_within_a_bound(case):
    t, pair, v, layer = case
    sizes = reference.Projections(*map(abs, vars(pair).values()))
    vectors = reference.VeRA(abs(v.d), abs(v.b))
    bias = None if t.bias is None else abs(t.bias)
    x, W, G = abs(t.x), abs(t.W), abs(t.grad_y)
    bounds = [
        reference.forward(x, W, sizes, vectors, bias),
        *reference.backward(G, x, W, sizes, vectors),
    ]
    expected = [
        reference.forward(t.x, t.W, pair, v, t.bias),
        *reference.backward(t.grad_y, t.x, t.W, pair, v),
    ]
    # The longest way: three sums and the positions, two scalings and two additions.
    roundings = sum(t.W.shape) + len(t.A) + t.grad_y.size // len(t.W) + 6
    for ours, theirs, size in zip(run(t, layer), expected, bounds, strict=True):
        assert_within(ours, theirs, 2 * gamma(roundings) * size.astype(np.float64))


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
    small, large = nn.Sequential(nn.Linear(6, 9)), nn.Sequential(nn.Linear(6, 9))
    inject(small, VeRAConfig(r=3), ["0"])
    inject(large, VeRAConfig(r=3), ["0"])
    state = adapter_state_dict(small)
    state["0.projections.drawn"] = torch.tensor([0, 3, 5, 9])
    load_adapter_state_dict(large, state)
    with pytest.raises(InputError, match=r"up to \(9, 5\).*here \(9, 6\)"):
        large(torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_gives_every_bit_back_however_often(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)).to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    inject(model, VeRAConfig(r=6), ["0", "1"])
    with torch.no_grad():
        for layer in model:
            layer.adapters["default"].b.normal_()
    x = torch.randn(3, 24, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    for _ in range(5):
        assert not torch.equal(merge(model)(x), model[1].base(model[0].base(x)))
        unmerge(model)
    assert torch.equal(model(x), y)
    for old, new in zip(before, unload(model).parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_new_adapter_changes_nothing_and_a_model_learns():
    model = llama()
    expected = model(TEXT).logits
    inject(model, VeRAConfig(r=8), ["q_proj", "down_proj"])
    assert torch.equal(model(TEXT).logits, expected)
    first = model(TEXT, labels=TEXT).loss
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()
    assert model(TEXT, labels=TEXT).loss < first


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
