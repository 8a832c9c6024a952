"""The contract of every parametrization: the torch column agrees with the reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.torch.inject import (
    adapted,
    inject,
    merge,
    trainable_parameters,
    unload,
    unmerge,
)
from tests.agreement.llama import TEXT, llama
from tests.agreement.on_torch import (
    ADAPTED,
    CONFIGS,
    conv1d,
    dense,
    module,
    numpy,
    run,
    tensor,
)
from tests.bounds import assert_both_within
from tests.parametrizations import ROWS
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_sums

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
layouts = pytest.mark.parametrize("layout", [dense, conv1d])
NEVER_LOOKED_UP = ("ia3", "qlora")  # an embedding has no input to scale, and no codes
# The norm of a row is no sum of products; tests/agreement/test_dora.py has its bound.
rounded_rows = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.proof is None], ids=lambda row: row.name
)


def expected(case):
    return [case.forward(), *case.backward()]


@layouts
@rows
@given(data=st.data())
def test_values_and_gradients_agree_bit_for_bit(row, layout, data):
    case = row.case(data, "integers")
    for ours, theirs in zip(
        run(module(case, layout), case), expected(case), strict=True
    ):
        assert_sums(ours, theirs)


@rounded_rows
@given(data=st.data())
def test_values_and_gradients_agree_up_to_rounding(row, data):
    case = row.case(data, "gaussians")
    ours, theirs = run(module(case), case), expected(case)
    for one, other, sizes in zip(ours, theirs, expected(case.counted()), strict=True):
        assert_both_within(one, other, sizes, sizes)


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row.name not in NEVER_LOOKED_UP],
    ids=lambda row: row.name,
)
@given(data=st.data(), seed=seeds)
def test_an_embedding_is_the_layer_on_one_hot_rows(row, data, seed):
    case = row.case(data, "integers")
    d, k = case.base.shape
    ids = np.random.default_rng(seed).integers(0, k, (2, 3))
    grad_y = np.broadcast_to(case.grad_y.reshape(-1, d)[0], (2, 3, d)).copy()
    one_hot = np.eye(k, dtype=np.float32)[ids]
    case = replace(case, x=one_hot, grad_y=grad_y, bias=None)
    layer = ADAPTED[row.name](nn.Embedding(k, d, _weight=tensor(case.base.T)), case)
    y = layer(tensor(ids))
    y.backward(tensor(grad_y))
    assert_sums(numpy(y), case.forward())
    adapter = layer.adapters["default"]
    for name, gradient in zip(row.trained, case.backward()[1:], strict=True):
        assert_sums(numpy(getattr(adapter, name).grad), gradient)
    assert_sums(numpy(layer.merge()(tensor(ids))), numpy(y))


@layouts
@rows
@given(data=st.data())
def test_merged_layers_agree_bit_for_bit(row, layout, data):
    case = row.case(data, "integers")
    layer = module(case, layout)
    assert_sums(numpy(layer.merged()), case.merged())
    assert_sums(numpy(layer.merge()(tensor(case.x))), case.merged_forward())


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.name in CONFIGS], ids=lambda row: row.name
)
@given(data=st.data())
def test_what_unload_returns_is_a_plain_layer(row, data):
    case = row.case(data, "integers")
    plain = module(case).merge().unload()
    assert type(plain) is nn.Linear
    assert_sums(numpy(plain(tensor(case.x))), case.merged_forward())
    before = module(case).merge().unmerge().unload()
    assert_bits(numpy(before.weight), case.base)
    if case.bias is not None:
        assert_bits(numpy(before.bias), case.bias)


@rounded_rows
@given(data=st.data())
def test_merged_weights_agree_up_to_rounding(row, data):
    case = row.case(data, "gaussians")
    sizes = case.counted().merged()
    assert_both_within(numpy(module(case).merged()), case.merged(), sizes, sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", CONFIGS)
def test_unmerging_gives_every_bit_back_however_often(row, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)).to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    plain = model[0].weight.detach().clone()
    inject(model, CONFIGS[row], ["0", "1"])
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.normal_()
            p.view(-1)[0], p.view(-1)[1] = 0, 1e-8  # a division cannot restore W
    x = torch.randn(3, 24, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    for _ in range(5):
        assert not torch.equal(merge(model)[0].merged_weight, plain)
        unmerge(model)
    assert torch.equal(model(x), y)
    for old, new in zip(before, unload(model).parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("row", CONFIGS)
def test_a_llama_starts_unchanged_learns_and_merges(row):
    model, targets = llama(), ["q_proj", "down_proj"]
    expected = model(TEXT).logits
    config = CONFIGS[row]
    if row == "ia3":
        config = replace(config, feedforward=targets[1:])
    inject(model, config, targets)
    assert torch.equal(model(TEXT).logits, expected)
    first = model(TEXT, labels=TEXT).loss
    trained = trainable_parameters(model)
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(TEXT, labels=TEXT).loss.backward()
        optimizer.step()
    assert model(TEXT, labels=TEXT).loss < first
    assert not any(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert not adapted(unload(merge(model)))


def test_every_row_is_here():
    names = {row.name for row in ROWS}
    assert names == set(ADAPTED)
    assert names - {"qlora"} == set(CONFIGS)  # QLoRA is LoRA on a quantized base
