"""QLoRA in torch agrees with the reference: bits, bounds, gradients, merges."""

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
from minipeft.torch import qlora
from minipeft.torch.inject import inject, trainable_parameters, unload
from minipeft.torch.inject import merge as merge_model
from minipeft.torch.lora import LoRA, LoRAConfig, LoRALinear
from minipeft.torch.qlora import QuantizedLinear, quantize_linears
from tests.agreement.llama import TEXT, llama
from tests.agreement.on_torch import codes, lora, module, tensor
from tests.parametrizations import ROWS, quantized
from tests.properties.test_qlora import sixteen_bits
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_sums, assert_within

QLORA = next(row for row in ROWS if row.name == "qlora")
nested = st.booleans()


@given(seeds, nested)
def test_sixteen_bits_agree_up_to_their_rounding(seed, double):
    rng = np.random.default_rng(seed)
    x, W, A, B = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((3, 12), (7, 12), (2, 12), (7, 2))
    )
    q = quantized(W, double)
    update = reference_lora.LoRA(A, B, 2.0)
    adapted = LoRALinear(QuantizedLinear(codes(q)).bfloat16(), lora(update))
    y = adapted(tensor(x).bfloat16())
    assert y.dtype == torch.bfloat16
    expected = reference.forward(x.astype(bfloat16), q, update)
    absolute = reference_lora.LoRA(abs(A), abs(B), 2.0)
    W = abs(reference.dequantize(q))
    size = reference_lora.forward(abs(x), W, absolute).astype(np.float64)
    bound = 2 * sixteen_bits(W.shape[1], "bfloat16") * size  # both sides err
    actual = y.detach().float().numpy()
    assert_within(actual, expected.astype(np.float32), bound)


@given(st.data())
def test_both_merges_agree_bit_for_bit(data):
    case = QLORA.case(data, "integers")
    merged = qlora.merge(module(case))
    assert_sums(merged.weight.numpy(), reference.merge(case.base, case.adapter))
    again = qlora.requantize(module(case))
    expected = reference.requantize(case.base, case.adapter)
    assert_bits(again.packed.numpy(), expected.packed)
    assert_bits(again.absmax.numpy(), expected.absmax)


@given(st.data())
def test_requantizing_keeps_the_kind_and_the_bias(data):
    case = QLORA.case(data, "gaussians")
    adapted = module(case)
    before = copy.deepcopy(adapted.state_dict())
    again = qlora.requantize(adapted)
    assert type(again.q) is type(adapted.base.q)
    assert again.constants == adapted.base.constants
    assert (again.bias is None) == (case.bias is None)
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
    with pytest.raises(InputError, match=r"quantized already .*the rest is skipped"):
        quantize_linears(model, skip=("*",))


def test_other_bases_are_refused():
    lora = LoRA(torch.ones(1, 3), torch.ones(2, 1), 2.0)
    plain = LoRALinear(nn.Linear(3, 2), lora)
    for merge in (qlora.merge, qlora.requantize):
        with pytest.raises(InputError, match="the base is a Linear"):
            merge(plain)
