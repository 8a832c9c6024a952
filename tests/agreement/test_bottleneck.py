"""The torch column's bottleneck adapters: bits, bounds, placements, no merge."""

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from minipeft.errors import InputError
from minipeft.reference import bottleneck as reference
from minipeft.torch import bottleneck
from minipeft.torch.bottleneck import BottleneckConfig, Parallel, place_beside
from minipeft.torch.inject import inject, merge, trainable_parameters, unload
from tests.agreement.llama import TEXT, llama
from tests.properties.test_bottleneck import adapters
from tests.strategies import integers
from tests.tolerance import assert_bits


def tensor(array):
    return torch.from_numpy(np.array(array))


def module(a):
    made = bottleneck.Bottleneck(tensor(a.down), tensor(a.up), a.scaling)
    with torch.no_grad():
        made.down_bias.copy_(tensor(a.down_bias))
        made.up_bias.copy_(tensor(a.up_bias))
    return made


def run(x, adapter, grad):
    """Return the output, then the gradients of x and of the four parts."""
    leaf = tensor(x).requires_grad_()
    y = adapter(leaf)
    y.backward(tensor(grad))
    trained = (adapter.down, adapter.down_bias, adapter.up, adapter.up_bias)
    return [y.detach().numpy(), *(v.grad.numpy() for v in (leaf, *trained))]


@given(adapters(integers, 0.5))
def test_values_and_gradients_agree_bit_for_bit(case):
    x, a, grad = case
    expected = [reference.forward(x, a), *reference.backward(grad, x, a)]
    for ours, theirs in zip(run(x, module(a), grad), expected, strict=True):
        assert_bits(ours + 0, theirs + 0)  # plus zero: its sign depends on the order


class Block(nn.Module):
    """Two sublayers, as in the block of the reference."""

    def __init__(self):
        super().__init__()
        self.attention, self.feedforward = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.feedforward(x)


def _whole_numbers(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=generator))
    return model


def _in_numpy(adapter):
    names = ("down", "down_bias", "up", "up_bias")
    arrays = (getattr(adapter, name).detach().numpy() for name in names)
    return reference.Bottleneck(*arrays, adapter.scaling)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "beside"])
def test_every_placement_is_the_references(placement):
    model = Block()
    config = BottleneckConfig(bottleneck=2, scaling=0.5)
    if placement == "beside":
        place_beside(model, config, ["feedforward"], features=6)
    else:
        both = ["attention", "feedforward"]
        inject(model, config, both if placement == "houlsby" else both[1:])
    _whole_numbers(model)
    x = torch.randint(-2, 3, (3, 6)).float()

    def sublayer(layer):
        layer = getattr(layer, "base", layer)
        return lambda x: layer(tensor(x)).detach().numpy()

    made = [
        _in_numpy(m) for m in model.modules() if isinstance(m, bottleneck.Bottleneck)
    ]
    sublayers = (sublayer(model.attention), sublayer(model.feedforward))
    chosen = tuple(made) if placement == "houlsby" else made[0]
    expected = getattr(reference, placement)(x.numpy(), sublayers, chosen)
    assert_bits(model(x).detach().numpy() + 0, expected + 0)


@pytest.mark.parametrize("targets", [["o_proj", "down_proj"], ["down_proj"], ["mlp"]])
def test_a_llama_starts_unchanged_and_learns(targets):
    model = llama()
    expected = model(TEXT).logits
    config = BottleneckConfig(bottleneck=4)
    if targets == ["mlp"]:
        place_beside(model, config, targets, features=32)
    else:
        inject(model, config, targets)
    assert torch.equal(model(TEXT).logits, expected)
    trained = trainable_parameters(model)
    per_adapter = 2 * 4 * 32 + 4 + 32
    assert sum(p.numel() for p in trained) == 2 * len(targets) * per_adapter
    first = model(TEXT, labels=TEXT).loss
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()
    assert model(TEXT, labels=TEXT).loss < first


def test_merging_is_refused_with_the_reason():
    model = Block()
    before = model.attention.weight.clone()
    inject(model, BottleneckConfig(bottleneck=2), ["attention"])
    with pytest.raises(InputError, match="bends at its ReLU"):
        merge(model)
    assert torch.equal(unload(model).attention.weight, before)


def test_bad_input_is_refused_before_anything_changes():
    model = Block()
    with pytest.raises(InputError, match=r"^attention: bottleneck is 0"):
        inject(model, BottleneckConfig(bottleneck=0), ["attention"])
    with pytest.raises(InputError, match=r"^attention: bottleneck is 0"):
        place_beside(model, BottleneckConfig(bottleneck=0), ["attention"], 6)
    with pytest.raises(
        InputError, match=r"'mlp' matches nothing; choose from attention"
    ):
        place_beside(model, BottleneckConfig(bottleneck=2), ["mlp"], 6)
    assert all(p.requires_grad for p in model.parameters())
    place_beside(model, BottleneckConfig(bottleneck=2), ["attention"], 6)
    assert isinstance(model.attention, Parallel)
    with pytest.raises(InputError, match="beside it already"):
        place_beside(model, BottleneckConfig(bottleneck=2), ["attention"], 6)
