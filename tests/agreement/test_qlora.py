"""QLoRA in torch against the reference: bits, bounds, gradients, merges."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from torch import nn

from minipeft.errors import InputError
from minipeft.reference import blockwise as reference_blockwise
from minipeft.reference import double_quant as reference_double_quant
from minipeft.reference import lora as reference_lora
from minipeft.reference import qlora as reference
from minipeft.torch import blockwise, double_quant, qlora
from minipeft.torch.inject import inject, trainable_parameters, unload
from minipeft.torch.inject import merge as merge_model
from minipeft.torch.lora import LoRA, LoRAConfig, LoRALinear
from minipeft.torch.qlora import QuantizedLinear, quantize_linears
from tests.agreement.llama import TEXT, llama
from tests.properties.test_qlora import adapter, on_a_grid, quantized
from tests.strategies import gaussian_layers, integer_layers, seeds
from tests.tolerance import assert_bits, assert_sums, assert_within, gamma

nested = st.booleans()


def tensor(array):
    return torch.from_numpy(np.array(array))


def on_torch(q):
    """The reference's base as ours."""
    kind = (
        blockwise.Blockwise
        if isinstance(q, reference_blockwise.Blockwise)
        else double_quant.Nested
    )
    parts = {k: tensor(v) if hasattr(v, "dtype") else v for k, v in vars(q).items()}
    return kind(**parts)


def layer(t, q):
    """LoRA on the quantized base."""
    bias = None if t.bias is None else tensor(t.bias)
    lora = LoRA(tensor(t.A), tensor(t.B), float(t.scaling))
    return LoRALinear(QuantizedLinear(on_torch(q), bias), lora)


@given(integer_layers, seeds)
def test_forward_and_gradients_agree_bit_for_bit(t, seed):
    q = on_a_grid(t.W, seed)
    x, adapted = tensor(t.x).requires_grad_(), layer(t, q)
    y = adapted(x)
    assert_sums(y.detach().numpy(), reference.forward(t.x, q, adapter(t), t.bias))
    y.backward(tensor(t.grad_y))
    expected = reference.backward(t.grad_y, t.x, q, adapter(t))
    lora = adapted.adapters["default"]
    for actual, gradient in zip((x, lora.A, lora.B), expected, strict=True):
        assert_sums(actual.grad.numpy(), gradient)


@given(gaussian_layers, nested)
def test_forward_agrees_up_to_rounding(t, double):
    q = quantized(t.W, double)
    absolute = reference_lora.LoRA(abs(t.A), abs(t.B), abs(t.scaling))
    bias = None if t.bias is None else abs(t.bias)
    W = abs(reference.dequantize(q))
    size = reference_lora.forward(abs(t.x), W, absolute, bias).astype(np.float64)
    roundings = t.W.shape[1] + t.A.shape[0] + 4
    expected = reference.forward(t.x, q, adapter(t), t.bias)
    actual = layer(t, q)(tensor(t.x)).detach().numpy()
    assert_within(actual, expected, 2 * gamma(roundings) * size)


@given(seeds, nested)
def test_sixteen_bits_agree_up_to_their_rounding(seed, double):
    rng = np.random.default_rng(seed)
    x, W, A, B = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((3, 12), (7, 12), (2, 12), (7, 2))
    )
    q = quantized(W, double)
    base = QuantizedLinear(on_torch(q)).bfloat16()
    adapted = LoRALinear(base, LoRA(tensor(A), tensor(B), 2.0))
    y = adapted(tensor(x).bfloat16())
    assert y.dtype == torch.bfloat16
    update = reference_lora.LoRA(A, B, 2.0)
    expected = reference.forward(x.astype(bfloat16), q, update)
    absolute = reference_lora.LoRA(abs(A), abs(B), 2.0)
    W = abs(reference.dequantize(q))
    size = reference_lora.forward(abs(x), W, absolute).astype(np.float64)
    # As in the reference's law, on either side.
    bound = 2 * gamma(16, "bfloat16") * size
    actual = y.detach().float().numpy()
    assert_within(actual, expected.astype(np.float32), bound)


@given(integer_layers, seeds, st.sampled_from(qlora.TARGETS))
def test_both_merges_agree_bit_for_bit(t, seed, into):
    q = on_a_grid(t.W, seed)
    merged = qlora.merge(layer(t, q), into)
    verb = reference.merge if into == "dequantized" else reference.requantize
    expected = verb(q, adapter(t))
    if into == "dequantized":
        assert_sums(merged.weight.numpy(), expected)
    else:
        assert_bits(merged.packed.numpy(), expected.packed)
        assert_bits(merged.absmax.numpy(), expected.absmax)


@given(gaussian_layers, nested)
def test_requantizing_keeps_the_kind_and_the_bias(t, double):
    adapted = layer(t, quantized(t.W, double))
    before = copy.deepcopy(adapted.state_dict())
    again = qlora.merge(adapted, "requantized")
    assert type(again.q) is type(adapted.base.q)
    assert again.constants == adapted.base.constants
    assert (again.bias is None) == (t.bias is None)
    assert again.bias is None or torch.equal(again.bias, adapted.base.bias)
    for name, tensor_ in adapted.state_dict().items():
        assert torch.equal(tensor_, before[name])


@given(seeds, st.sampled_from([None, 256, 4]))
def test_from_linear_stores_the_bytes_of_the_reference(seed, b2):
    W = np.random.default_rng(seed).standard_normal((7, 24)).astype(np.float32)
    linear = nn.Linear(24, 7)
    linear.weight = nn.Parameter(tensor(W))
    q = QuantizedLinear.from_linear(linear, blocksize=8, nested_blocksize=b2).q
    if b2 is None:
        expected = reference_blockwise.quantize(W, blocksize=8)
    else:
        expected = reference_double_quant.quantize(W, blocksize=8, nested_blocksize=b2)
    for name, value in vars(expected).items():
        if hasattr(value, "dtype"):
            assert_bits(getattr(q, name).numpy(), np.asarray(value))


@pytest.mark.parametrize("b2", [None, 4])
def test_scales_survive_a_cast_and_a_state_dict(b2):
    base = QuantizedLinear.from_linear(
        nn.Linear(24, 7), blocksize=8, nested_blocksize=b2
    )
    before = copy.deepcopy(base.state_dict())
    other = QuantizedLinear.from_linear(
        nn.Linear(24, 7), blocksize=8, nested_blocksize=b2
    ).bfloat16()
    assert other.weight.dtype == torch.bfloat16
    other.load_state_dict(before)
    for name, value in other.state_dict().items():
        if name != "bias":
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("b2", [None, 256])
def test_a_whole_model_trains_its_adapters_and_nothing_else(b2):
    model = quantize_linears(llama(), nested_blocksize=b2)
    inject(model, LoRAConfig(r=2, alpha=4), ["q_proj", "down_proj"])
    frozen = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if "adapters" not in name
    }
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()
    assert all(
        (p.grad is not None) == ("adapters" in name)
        for name, p in model.named_parameters()
    )
    for name, value in frozen.items():
        assert torch.equal(model.state_dict()[name], value)
    assert any(p.any() for n, p in model.named_parameters() if n.endswith("B"))
    logits = model(TEXT).logits
    merged = unload(merge_model(model))(TEXT).logits
    assert not torch.equal(logits, llama()(TEXT).logits)
    assert merged.shape == logits.shape


def test_quantize_linears_leaves_what_it_is_told_to_leave():
    model = quantize_linears(llama(), skip=("lm_head", "layers.0.*"))
    kinds = {n: type(m) for n, m in model.named_modules() if "proj" in n}
    assert all(k is nn.Linear for n, k in kinds.items() if "layers.0" in n)
    assert all(k is QuantizedLinear for n, k in kinds.items() if "layers.1" in n)
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(InputError, match="no linear layer to quantize"):
        quantize_linears(model, skip=("*",))


def test_other_targets_and_bases_are_refused():
    lora = LoRA(torch.ones(1, 3), torch.ones(2, 1), 2.0)
    plain = LoRALinear(nn.Linear(3, 2), lora)
    with pytest.raises(InputError, match="the base is a Linear"):
        qlora.merge(plain)
    four = LoRALinear(QuantizedLinear.from_linear(nn.Linear(3, 2)), lora)
    with pytest.raises(
        InputError, match="into is 'original'; choose dequantized or re"
    ):
        qlora.merge(four, into="original")
