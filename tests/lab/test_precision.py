"""Training a base in 16 bits with adapters in 32, and preparing one in 4 bits."""

import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab.text import consecutive, windows
from minipeft.lab.train import TrainConfig, loss, train
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear, prepare, quantize_linears

TEXT = torch.arange(400) * 7 % 29 + 2
BATCHES = windows(TEXT, (4, 12), bos=1, seed=3)
VALIDATION = consecutive(TEXT, (4, 12), bos=1)[:2]


def adapted(model, method=LoRAConfig):
    torch.manual_seed(0)
    return inject(model, method(r=4, alpha=8), "all-linear")


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("method", [LoRAConfig, DoRAConfig])
def test_a_base_in_bfloat16_trains_adapters_in_float32(toy, method, quantized):
    base = toy.to(torch.bfloat16)
    model = adapted(quantize_linears(base) if quantized else base, method)
    before = loss(model, VALIDATION)
    fixed = {k: v.clone() for k, v in model.state_dict().items() if "adapter" not in k}
    history = train(model, BATCHES, TrainConfig(5, lr=3e-2), VALIDATION)
    assert history.validation[-1][1] < before
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in fixed.items())


def test_an_update_below_the_steps_of_bfloat16_is_kept(toy):
    """Near 1 the next bfloat16 number is 2^-7 away; an adapter's is nearer."""
    model = adapted(toy.to(torch.bfloat16), DoRAConfig)
    named = model.named_parameters()
    before = {n: p.detach().clone() for n, p in named if p.requires_grad}
    train(model, BATCHES, TrainConfig(2, lr=1e-5))
    for name, parameter in model.named_parameters():
        if name in before and "magnitude" in name:
            moved = parameter != before[name]
            unseen = parameter.bfloat16() == before[name].bfloat16()
            assert (moved & unseen).any()


def test_preparing_keeps_in_float32_what_is_not_quantized(toy):
    model = quantize_linears(toy.to(torch.bfloat16))
    codes = [
        m.packed.clone() for m in model.modules() if isinstance(m, QuantizedLinear)
    ]
    norm = model.model.norm.weight.detach().clone()
    assert prepare(model) is model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.model.norm.weight, norm.float())
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert all(torch.equal(m.packed, c) for m, c in zip(layers, codes, strict=True))
    assert {m.weight.dtype for m in layers} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = adapted(model)
    before = loss(model, VALIDATION)
    with torch.autocast("cpu", torch.bfloat16):
        train(model, BATCHES, TrainConfig(5, lr=3e-2))
    assert loss(model, VALIDATION) < before


def test_preparing_is_refused_where_there_is_nothing_to_prepare(toy):
    with pytest.raises(InputError, match="no layer is quantized"):
        prepare(toy)
    with pytest.raises(InputError, match=r"has adapters; prepare first"):
        prepare(adapted(quantize_linears(toy)))
