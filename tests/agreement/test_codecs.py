"""The contract of every codec: both columns write and decode the same bytes."""

import importlib
from dataclasses import fields

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given

from minipeft.errors import InputError
from minipeft.reference import codebook
from minipeft.torch import double_quant as torch_double_quant
from minipeft.torch.qlora import QuantizedLinear
from tests.agreement.on_torch import codes
from tests.codecs import CODEBOOKS, CODECS, codebooks
from tests.strategies import anything_finite, blocksizes, weights
from tests.tolerance import assert_bits

each = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
DTYPES = {
    torch.float32: np.float32,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float64: np.float64,
}


def column(codec):
    return importlib.import_module(f"minipeft.torch.{codec.name}")


def to_numpy(tensor):
    """Return a NumPy array; bfloat16 is a type of ml_dtypes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def ours(codec, W, values=codebook.NF4, sizes=(8, 2)):
    values = torch.from_numpy(values.copy())
    return column(codec).quantize(W, values, *sizes[: codec.sizes])


def assert_agree(codec, W, values=codebook.NF4, sizes=(8, 2)):
    expected = codec.quantize(W, values, sizes)
    q = ours(codec, torch.tensor(W), values, sizes)
    for field in fields(expected):
        mine, theirs = getattr(q, field.name), getattr(expected, field.name)
        if isinstance(mine, torch.Tensor):
            assert_bits(mine.numpy(), np.asarray(theirs))
        else:
            assert mine == theirs
    for dtype, kind in DTYPES.items():
        decoded = to_numpy(column(codec).dequantize(q, dtype))
        with np.errstate(over="ignore"):
            assert_bits(decoded, codec.module.dequantize(expected, kind))


@each
@given(W=weights(), values=codebooks, b=blocksizes, b2=blocksizes)
def test_weights(codec, W, values, b, b2):
    assert_agree(codec, W, values, (b, b2))


@each
@given(W=anything_finite((70,)), values=codebooks, b=blocksizes)
@example(np.array([1e-45, -3e-45, 0, 2e-39], np.float32), codebook.NF4, 2)
@example(np.array([3.4e38, -3.4e38, 1, 1e-38], np.float32), codebook.NF4, 4)
@example(np.zeros(9, np.float32), codebook.FP4, 4)
@example(np.array([-0.0, 0.0, -1e-4, 1e-4, -1], np.float32), codebook.FP4, 8)
def test_anything_finite(codec, W, values, b):
    if "offset" in codec.scales:  # the largest float minus the offset overflows
        W = W / np.float32(4)
    assert_agree(codec, W, values, (b, 4))


@each
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 5)])
@pytest.mark.parametrize("name", ["NF4", "NF3", "dynamic"])
def test_shapes(codec, shape, name):
    W = np.asarray(np.arange(np.prod(shape)).reshape(shape) - 3, dtype=np.float32)
    assert_agree(codec, W, CODEBOOKS[name])


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_dtypes_are_read_as_float32_and_in_order(codec, dtype):
    W = torch.randn(31, 7, generator=torch.Generator().manual_seed(0)).to(dtype).T
    q, expected = ours(codec, W), codec.quantize(W.float().contiguous().numpy())
    for name in codec.parts:
        assert_bits(getattr(q, name).numpy(), np.asarray(getattr(expected, name)))


BAD = {
    "nan": (np.array([[1, np.nan], [np.nan, 1]], np.float32), codebook.NF4, (8, 2)),
    "infinite": (np.array([1, -np.inf], np.float32), codebook.NF4, (8, 2)),
    "no block": (np.ones(4, np.float32), codebook.NF4, (0, 2)),
    "blocks of 96": (np.ones(4, np.float32), codebook.NF4, (96, 2)),
    "15 values": (np.ones(4, np.float32), codebook.NF4[1:], (8, 2)),
}


@each
@pytest.mark.parametrize("name", BAD)
def test_the_same_is_refused_in_the_same_words(codec, name):
    W, values, sizes = BAD[name]
    with pytest.raises(InputError) as theirs:
        codec.quantize(W, values, sizes)
    with pytest.raises(InputError) as mine:
        ours(codec, torch.from_numpy(W), values, sizes)
    assert str(mine.value) == str(theirs.value)


@each
def test_a_part_of_another_size_is_refused_in_the_same_words(codec):
    for wrong, _ in codec.spoilt():
        with pytest.raises(InputError) as theirs:
            codec.module.dequantize(wrong)
        with pytest.raises(InputError) as mine:
            column(codec).dequantize(codes(wrong))
        assert str(mine.value) == str(theirs.value)
        for hold in (QuantizedLinear, torch_double_quant.bits_per_parameter):
            with pytest.raises(InputError) as held:
                hold(codes(wrong))
            assert str(held.value) == str(theirs.value)


@each
def test_the_weight_keeps_its_gradient_and_its_values(codec):
    W = torch.randn(5, 7, requires_grad=True)
    before = W.detach().clone()
    q = ours(codec, W)
    assert torch.equal(W, before)
    assert not any(getattr(q, name).requires_grad for name in codec.parts)
