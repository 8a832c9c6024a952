"""The torch column's LoftQ: the reference's bytes and errors, and its layer."""

import copy
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.reference import loftq as reference
from minipeft.reference import lora as reference_lora
from minipeft.torch import blockwise, codebook, loftq
from minipeft.torch import inject as surgery
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.qlora import QuantizedLinear
from tests.agreement.llama import TEXT, llama
from tests.bounds import assert_both_within, counted
from tests.properties.test_loftq import (
    codebooks,
    layers,
    matrices,
    plain_error,
    ranks,
    slack,
)
from tests.tolerance import assert_bits


def tensor(array):
    return torch.from_numpy(array.copy())


@given(matrices(), ranks, codebooks)
def test_the_first_base_agrees_byte_for_byte(W, r, values):
    ours, _ = next(loftq.alternate(tensor(W), r, 2 * r, tensor(values), 16))
    q, _ = next(reference.alternate(W, r, 2 * r, values, 16))
    assert_bits(ours.packed.numpy(), q.packed)
    assert_bits(ours.absmax.numpy(), q.absmax)


@given(matrices(), codebooks, st.sampled_from([0.25, 2.0, 7.0]))
def test_where_every_direction_is_sampled_the_error_agrees(W, values, scaling):
    r = 6  # 6 and the oversampling span all 30 directions
    ours = loftq.init(tensor(W), r, scaling * r, tensor(values), 16, steps=1)
    expected = reference.init(W, r, scaling * r, values, 16, steps=1)
    assert ours[1].scaling == scaling
    found, right = loftq.error(tensor(W), *ours), reference.error(W, *expected)
    assert abs(found - right) <= slack(W, r)


@given(matrices(), ranks, codebooks)
def test_more_steps_never_make_it_worse_and_one_is_no_worse_than_none(W, r, values):
    t = tensor(W)
    errors = [
        loftq.error(t, *loftq.init(t, r, 2 * r, tensor(values), 16, steps))
        for steps in (1, 3)
    ]
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[0] <= plain_error(W, values) + slack(W, r)


def test_nearly_exact_directions_are_worth_as_much():
    # 256 x 192 at rank 8: after five steps within a hundredth of the exact SVD's error.
    W = np.random.default_rng(0).standard_normal((256, 192)).astype(np.float32)
    exact = reference.error(W, *reference.init(W, 8, 16))
    assert loftq.error(tensor(W), *loftq.init(tensor(W), 8, 16)) < 1.01 * exact
    assert exact < 0.99 * plain_error(W, codebook.NF4.numpy())


def test_the_same_weight_gives_the_same_start():
    W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    starts = [loftq.init(W, 4, 8)[1] for _ in range(2)]
    assert torch.equal(starts[0].A, starts[1].A)
    assert torch.equal(starts[0].B, starts[1].B)


def test_the_best_of_the_alternation_is_kept():
    W = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))
    raw = [
        loftq.error(W, *pair)
        for pair in islice(loftq.alternate(W, 2, 4, codebook.NF2, 16), 5)
    ]
    assert loftq.error(W, *loftq.init(W, 2, 4, codebook.NF2, 16)) == min(raw)


@pytest.mark.parametrize("mean_bits", [2, 2.5, 3, 3.7, 4])
def test_the_plan_agrees(mean_bits):
    weights = layers(5)
    ours = loftq.plan({n: tensor(W) for n, W in weights.items()}, mean_bits)
    assert ours == reference.plan(weights, mean_bits)


def test_a_model_gets_its_bases_and_its_adapters_together():
    model, original = llama(), llama()
    plan = {"model.layers.0.self_attn.q_proj": codebook.NF2}
    config = LoftQConfig(r=4, alpha=8, codebooks=plan)
    surgery.inject(model, config, ["q_proj", "down_proj"])
    for name, layer in surgery.adapted(model).items():
        assert isinstance(layer.base, QuantizedLinear)
        assert len(layer.base.codebook) == (4 if name in plan else 16)
        W = original.get_submodule(name).weight.detach()
        plain = blockwise.dequantize(blockwise.quantize(W, layer.base.codebook))
        assert (W - layer.merged()).norm() < (W - plain).norm()
        x = torch.randn(3, W.shape[1])
        y, merged = layer(x), x @ layer.merged().T
        adapter = layer.adapters["default"]
        operands = (x, layer.base.weight, adapter.A, adapter.B)
        sizes, base, A, B = (counted(t.detach().numpy()) for t in operands)
        update = reference_lora.LoRA(A, B, adapter.scaling)
        apart = reference_lora.forward(sizes, base, update)
        together = linear.forward(sizes, reference_lora.merge(base, update))
        assert_both_within(y.detach().numpy(), merged.detach().numpy(), apart, together)


def test_only_the_adapters_are_trained_and_the_base_is_the_quantized_one():
    model = surgery.inject(llama(), LoftQConfig(r=4, alpha=8), ["q_proj", "v_proj"])
    trained = surgery.trainable_parameters(model)
    assert sum(p.numel() for p in trained) == 2 * 4 * (32 + 32 + 32 + 16)
    before = [layer.base.packed.clone() for layer in surgery.adapted(model).values()]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    model(input_ids=TEXT, labels=TEXT).loss.backward()
    assert all(p.grad is not None for p in trained)
    optimizer.step()
    for layer, packed in zip(surgery.adapted(model).values(), before, strict=True):
        assert torch.equal(layer.base.packed, packed)
    assert isinstance(
        surgery.unload(model).model.layers[0].self_attn.q_proj, QuantizedLinear
    )


def test_what_is_out_of_range_is_refused_with_the_name_of_the_layer():
    for config, sentence in (
        (LoftQConfig(r=99, alpha=8), "r is 99; choose 1 to 32"),
        (LoftQConfig(r=4, alpha=8, steps=0), "steps is 0"),
        (LoftQConfig(r=4, alpha=8, blocksize=48), "blocksize is 48"),
    ):
        with pytest.raises(InputError, match=f"layers.0.self_attn.q_proj: {sentence}"):
            surgery.inject(llama(), config, ["q_proj"])
    with pytest.raises(InputError, match="Embedding cannot be quantized"):
        surgery.inject(llama(), LoftQConfig(r=4, alpha=8), ["embed_tokens"])
    with pytest.raises(InputError, match=r"mean_bits is 5"):
        loftq.plan({"a": torch.ones(4, 4)}, 5)


def test_a_conv1d_is_split_as_the_linear_layer_of_its_transpose():
    torch.manual_seed(0)
    conv, plain = Conv1D(8, 12), nn.Linear(12, 8)
    with torch.no_grad():
        plain.weight.copy_(conv.weight.T)
        plain.bias.copy_(conv.bias.normal_())
    x = torch.randn(3, 12)
    found = []
    for layer in (conv, plain):
        config = LoftQConfig(r=2, alpha=4.0, blocksize=8)
        model = surgery.inject(nn.Sequential(layer), config, ["0"])
        assert isinstance(model[0].base, QuantizedLinear)
        found += [model(x), surgery.merge(model)(x)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_starts_as_its_values_in_32_do(dtype):
    def made(start):
        return surgery.inject(copy.deepcopy(start), LoftQConfig(2, 4.0), ["0"])[0]

    torch.manual_seed(0)
    narrow = nn.Sequential(nn.Linear(12, 10)).to(dtype)
    ours, expected = made(narrow), made(copy.deepcopy(narrow).float())
    assert torch.equal(ours.base.packed, expected.base.packed)
    for name, tensor in expected.adapters["default"].state_dict().items():
        assert torch.equal(ours.adapters["default"].state_dict()[name], tensor)
    assert ours(torch.ones(1, 12, dtype=dtype)).dtype == dtype
