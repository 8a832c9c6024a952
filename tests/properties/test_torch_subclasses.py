"""Layers like `nn.Linear`: GPT-2's Conv1D, and subclasses with other forward passes."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.errors import InputError
from minipeft.torch.inject import inject, merge, unload
from minipeft.torch.linear import computes_as_linear
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear, quantize_linears

CONFIG = LoRAConfig(2, 4.0)


class Falcons(nn.Linear):
    """The same product written in another way, as in Falcon."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Cautious(nn.Linear):
    """The same product after a check of x."""

    def forward(self, x):
        if x.dim() == 0:
            raise ValueError
        return super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Clamped(nn.Linear):
    """A product that differs from the plain one for large values only."""

    def forward(self, x):
        return super().forward(x).clamp(-20, 20)


class NoisyInTraining(nn.Linear):
    def forward(self, x):
        return super().forward(x + 1 if self.training else x)


class OfHalves(nn.Linear):
    """A product that differs from the plain one in 16 bits only."""

    def forward(self, x):
        y = super().forward(x)
        return -y if x.dtype == torch.bfloat16 else y


class WithState(nn.Linear):
    """A layer with a second tensor, which may change what the layer computes."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return self.scale * super().forward(x)


class WithoutItsBias(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


SAME = [Falcons, Cautious]
OTHER = [Doubled, Clamped, NoisyInTraining, OfHalves, WithState, WithoutItsBias]


def of(kind, bias=True):
    torch.manual_seed(0)
    layer = kind(8, 5, bias) if kind is not WithState else kind(8, 5)
    return nn.ModuleDict({"up": nn.Linear(8, 8), "down": layer})


def trained(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.adapters.parameters():
            p.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", SAME)
def test_one_that_computes_the_same_is_adapted_merged_and_quantized(kind, bias):
    x, twin = torch.ones(3, 8), of(nn.Linear, bias)
    model = of(kind, bias)
    model.load_state_dict(twin.state_dict())
    assert computes_as_linear(model["down"])
    found = []
    for one in (model, twin):
        layer = trained(inject(one, CONFIG, ["down"])["down"])
        found.append([layer(x), merge(one)["down"](x)])
        found[-1].append(unload(one)["down"].weight)
    assert all(map(torch.equal, *found))
    packed = [quantize_linears(one, blocksize=8)["down"] for one in (model, twin)]
    assert torch.equal(packed[0](x), packed[1](x))


@pytest.mark.parametrize("kind", OTHER)
def test_one_that_computes_something_else_is_refused(kind):
    model = of(kind)
    sentence = f"^down: {kind.__name__} is a Linear with a forward of its own"
    with pytest.raises(InputError, match=sentence):
        inject(model, CONFIG, ["down"])
    assert type(model["down"]) is kind
    assert all(p.requires_grad for p in model.parameters())
    inject(model, CONFIG, "all-linear")  # a layer that no target names stays as it is
    assert type(model["down"]) is kind
    quantized = quantize_linears(of(kind), blocksize=8)
    assert type(quantized["down"]) is kind
    assert type(quantized["up"]) is QuantizedLinear


def test_a_conv1d_is_quantized_as_the_linear_layer_of_its_transpose():
    torch.manual_seed(0)
    conv, plain = Conv1D(8, 12), nn.Linear(12, 8)
    with torch.no_grad():
        plain.weight.copy_(conv.weight.T)
        plain.bias.copy_(conv.bias.normal_())
    x = torch.randn(3, 12)
    for nested in (None, 256):
        one = QuantizedLinear.from_linear(conv, blocksize=8, nested_blocksize=nested)
        other = QuantizedLinear.from_linear(plain, blocksize=8, nested_blocksize=nested)
        assert one.packed.tolist() == other.packed.tolist()
        assert torch.equal(one(x), other(x))
    assert one.weight.shape == (8, 12)
    model = quantize_linears(nn.ModuleDict({"c": conv}).eval(), blocksize=8)
    assert type(model["c"]) is QuantizedLinear
    assert torch.equal(model["c"](x), other(x))
    assert not model["c"].training
    layer = trained(inject(model, CONFIG, ["c"])["c"])
    assert not torch.equal(layer(x), other(x))
    W = layer.merged()
    merged = unload(merge(model))["c"]
    assert type(merged) is Conv1D  # which holds the transpose
    assert torch.equal(merged.weight.T, W)
