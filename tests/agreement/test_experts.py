"""LoRA on experts agrees with the reference, however a model calls its experts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from minipeft.errors import InputError
from minipeft.reference import experts as reference
from minipeft.reference.experts import ExpertsLoRA as Reference
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.experts import ExpertsLoRA, LoRAExperts, StackLoRA
from minipeft.torch.ia3 import IA3Config
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
from minipeft.torch.linear import frozen
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.qlora import QuantizedExperts, QuantizedLinear, quantize_linears
from minipeft.torch.vera import VeRAConfig
from tests.agreement.on_torch import numpy, tensor
from tests.lab.architectures import build
from tests.properties.test_experts import integer_cases
from tests.tolerance import assert_sums

WAYS = ("eager", "grouped_mm", "batched_mm")
MODELS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM")
MODELS += ("DeepseekV3ForCausalLM",)
IDS = torch.arange(12).reshape(2, 6)


class OneExperts(nn.Module):
    """One product of experts, in all the forms in which models write it."""

    def __init__(self, W, bias, turned, way):
        super().__init__()
        self.is_transposed, self.way = turned, way
        stack = tensor(W).mT.contiguous() if turned else tensor(W)
        self.W, self.bias = nn.Parameter(stack), tensor(bias)

    def forward(self, x, chosen):
        W, b, shape = self.W, self.bias, (*chosen.shape, self.bias.shape[1])
        x, chosen = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
        if self.way == "batched_mm":
            taken = W[chosen].mT if self.is_transposed else W[chosen]
            y = torch.matmul(taken, x[..., None])[..., 0] + b[chosen]
            return y.reshape(shape)
        y = x.new_zeros(*x.shape[:-1], b.shape[1])
        for e in range(len(W)):
            own = torch.where(chosen == torch.tensor(e))
            if self.is_transposed:
                y[own] = x[own] @ W[torch.tensor(e)] + b[e]
            else:
                y[own] = nn.functional.linear(x[own], W[e], b[e])
        return y.reshape(shape)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("way", ["eager", "batched_mm"])
@given(case=integer_cases)
def test_values_gradients_and_merged_stacks_agree_bit_for_bit(way, turned, case):
    part = StackLoRA(
        tensor(case.adapter.A), tensor(case.adapter.B), case.adapter.scaling
    )
    base = OneExperts(case.W, case.bias, turned, way)
    layer = LoRAExperts(base, ExpertsLoRA({"W": part}))
    x = tensor(case.x).requires_grad_()
    y = layer(x, tensor(case.chosen))
    y.backward(tensor(case.grad_y))
    expected = reference.forward(case.x, case.chosen, case.W, case.adapter, case.bias)
    assert_sums(numpy(y), expected)
    gradients = reference.backward(
        case.grad_y, case.x, case.chosen, case.W, case.adapter
    )
    for ours, theirs in zip((x, part.A, part.B), gradients, strict=True):
        assert_sums(numpy(ours.grad), theirs)
    merged = layer.merge()._buffers["merged_W"]
    stored = merged.mT if turned else merged
    assert_sums(numpy(stored), reference.merge(case.W, case.adapter))
    assert_sums(numpy(layer(x, tensor(case.chosen))), expected)


def whole(model):
    """Give a model small integers, so that sums of products are exact."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data = torch.randint(-2, 3, p.shape).to(p.dtype)
    return model


def experts_of(name, way):
    """Return the first experts of a model of integers, and operands for them."""
    model = whole(build(name))
    model.set_experts_implementation(way)
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    holder = nn.ModuleDict({"experts": experts})
    torch.manual_seed(2)
    x = torch.randint(-2, 3, (5, 32)).float()
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    return holder, (x, ids, torch.ones(5, 2))


def without_bends(experts, name):
    """Remove the activation function, so that integers stay integers."""
    experts.act_fn = nn.Identity()
    if name == "GptOssForCausalLM":
        experts._apply_gate = lambda y: y[..., ::2] - y[..., 1::2]
    return experts


def test_the_ways_are_those_of_transformers():
    assert {"grouped_mm", "batched_mm"} <= set(ALL_EXPERTS_FUNCTIONS)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_starts_unchanged_learns_merges_and_unmerges(name, way, quantized):
    model = build(name)
    model.set_experts_implementation(way)
    if quantized:
        quantize_linears(model, blocksize=16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(IDS).logits
    inject(model, LoRAConfig(3, 6.0), ["experts"])  # 3 is no multiple of 16 bytes
    assert torch.equal(model(IDS).logits, plain)
    assert all(isinstance(m, LoRAExperts) for m in adapted(model).values())
    trained = trainable_parameters(model)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained)
    y = model(IDS).logits
    assert not torch.equal(y, plain)
    merged = merge(model)(IDS).logits
    assert torch.equal(unmerge(model)(IDS).logits, y)
    assert torch.equal(unload(merge(model))(IDS).logits, merged)
    kinds = {type(m) for m in model.modules()}
    assert LoRAExperts not in kinds
    if not quantized:
        model = unload(unmerge(inject(model, LoRAConfig(3, 6.0), ["experts"])))
        changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
        assert {k.rpartition(".")[2] for k in changed} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_merged_experts_of_a_model_are_those_of_the_reference(name, way):
    holder, _ = experts_of(name, way)
    base = holder["experts"]
    turned = base.is_transposed
    held = base.gate_up_proj.detach().clone()
    inject(holder, LoRAConfig(3, 6.0), ["experts"])
    for p in trainable_parameters(whole(holder)):
        assert p.shape[0] == 4
    base.gate_up_proj.data = held
    layer = merge(holder)["experts"]
    part = layer.adapters["default"]["gate_up_proj"]
    adapter = Reference(numpy(part.A), numpy(part.B), part.scaling)
    W = numpy(held.mT if turned else held)
    ours = layer._buffers["merged_gate_up_proj"]
    assert_sums(
        numpy(ours.mT if turned else ours).copy(),
        reference.merge(np.ascontiguousarray(W), adapter),
    )


@pytest.mark.parametrize("name", MODELS)
def test_each_way_of_a_model_computes_the_same(name):
    found = []
    for way in WAYS:
        holder, operands = experts_of(name, way)
        inject(holder, LoRAConfig(3, 6.0), ["experts"])
        whole(holder)
        without_bends(holder["experts"].base, name)
        found.append(holder["experts"](*operands))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_quantized_experts_are_each_a_quantized_layer(name, way):
    holder, operands = experts_of(name, way)
    base = without_bends(holder["experts"], name)
    for p in base.parameters():
        p.data = torch.randint(-1, 2, p.shape).float()  # NF4 has -1, 0 and 1
    layer = QuantizedExperts.from_experts(base, blocksize=16, nested_blocksize=None)
    for stack in ("gate_up_proj", "down_proj"):
        for W, one in zip(getattr(base, stack), layer.stacks[stack], strict=True):
            linear = frozen(W.mT.contiguous() if base.is_transposed else W)
            theirs = QuantizedLinear.from_linear(linear, blocksize=16)
            assert torch.equal(one.packed, theirs.packed)
            assert torch.equal(one.absmax, theirs.absmax)
    x, *rest = operands
    one, other = (x.clone().requires_grad_() for _ in range(2))
    expected, y = base(one, *rest), layer(other, *rest)
    assert torch.equal(y, expected)
    assert y.any()
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(one.grad, other.grad)


def test_tensors_of_experts_go_to_a_file_and_back():
    one, other = (
        inject(build(MODELS[0]), LoRAConfig(3, 6.0), ["experts", "q_proj"])
        for _ in range(2)
    )
    for p in trainable_parameters(one):
        p.data.normal_()
    tensors = adapter_state_dict(one)
    assert "model.layers.0.mlp.experts.gate_up_proj.A" in tensors
    load_adapter_state_dict(merge(other), tensors)
    assert torch.equal(merge(one)(IDS).logits, other(IDS).logits)


OTHERS = (DoRAConfig(2, 4.0), VeRAConfig(2), IA3Config(), PiSSAConfig(2, 4.0))


@pytest.mark.parametrize(
    "config", [*OTHERS, LoftQConfig(2, 4.0)], ids=lambda c: type(c).__name__
)
def test_other_methods_refuse_experts_by_name(config):
    model = build(MODELS[0])
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts"):
        inject(model, config, ["experts"])
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_and_stacks_of_unknown_order_are_refused():
    model = build(MODELS[0])
    with pytest.raises(InputError, match=r"dropout is 0\.1, and experts take none"):
        inject(model, LoRAConfig(2, 4.0, dropout=0.1), ["experts"])
    del model.model.layers[1].mlp.experts.is_transposed
    with pytest.raises(InputError, match="does not say whether its stacks are"):
        inject(model, LoRAConfig(2, 4.0), ["experts"])
    assert not adapted(model)
