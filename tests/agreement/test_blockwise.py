"""Both columns quantize to the same bytes, and give the same bytes back."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minipeft.errors import InputError
from minipeft.reference import blockwise as reference
from minipeft.reference import codebook
from minipeft.torch import blockwise
from tests.strategies import anything_finite, blocksizes, weights
from tests.tolerance import assert_bits

CODEBOOKS = {
    "NF4": codebook.NF4,
    "FP4": codebook.FP4,
    "NF3": codebook.NF3,
    "NF2": codebook.NF2,
    "one bit": np.array([1, -1], np.float32),
    "normal, five bits": codebook.normal_float(5),
    "dynamic": codebook.dynamic_map(),
}
codebooks = st.sampled_from(list(CODEBOOKS.values()))
DTYPES = {
    torch.float32: np.float32,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float64: np.float64,
}


def to_numpy(tensor):
    """Also for bfloat16, which NumPy knows only through ml_dtypes."""
    kind = DTYPES.get(tensor.dtype)
    if kind is ml_dtypes.bfloat16:
        return tensor.view(torch.int16).numpy().view(kind)
    return tensor.numpy()


def assert_agree(W, values, blocksize):
    expected = reference.quantize(W, values, blocksize)
    q = blockwise.quantize(torch.from_numpy(W), torch.from_numpy(values), blocksize)
    assert_bits(q.packed.numpy(), expected.packed)
    assert_bits(q.absmax.numpy(), expected.absmax)
    assert (q.blocksize, q.shape) == (expected.blocksize, expected.shape)
    for dtype, kind in DTYPES.items():
        values = to_numpy(blockwise.dequantize(q, dtype))
        assert_bits(values, reference.dequantize(expected, kind))


@given(weights(), codebooks, blocksizes)
def test_weights(W, values, blocksize):
    assert_agree(W, values, blocksize)


@given(anything_finite((70,)), codebooks, blocksizes)
@example(np.array([1e-45, -3e-45, 0, 2e-39], np.float32), codebook.NF4, 2)
@example(np.array([3.4e38, -3.4e38, 1, 1e-38], np.float32), codebook.NF4, 4)
@example(np.zeros(9, np.float32), codebook.FP4, 4)
@example(np.array([-0.0, 0.0, -1e-4, 1e-4, -1], np.float32), codebook.FP4, 8)
def test_anything_finite(W, values, blocksize):
    assert_agree(W, values, blocksize)


@pytest.mark.parametrize("name", ["NF4", "FP4", "NF3", "NF2"])
def test_ties_and_their_neighbours(name):
    values = CODEBOOKS[name]
    ordered = np.sort(values)
    midpoints = (ordered[:-1] + ordered[1:]) / np.float32(2)
    below, above = (np.nextafter(midpoints, np.float32(end)) for end in (-2, 2))
    # An absmax of 1 leaves every value as it is.
    W = np.concatenate([below, midpoints, above, np.ones(1, np.float32)])
    assert_agree(W, values, 64)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 5)])
def test_shapes(shape):
    W = np.asarray(np.arange(np.prod(shape)).reshape(shape) - 3, dtype=np.float32)
    for name in ("NF4", "NF3", "dynamic"):
        assert_agree(W, CODEBOOKS[name], 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_dtypes_are_read_as_float32(dtype):
    W = torch.randn(7, 31, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = reference.quantize(W.float().numpy())
    q = blockwise.quantize(W)
    assert_bits(q.packed.numpy(), expected.packed)
    assert_bits(q.absmax.numpy(), expected.absmax)


def test_rows_that_do_not_lie_in_memory_order_are_read_in_order():
    W = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).T
    expected = reference.quantize(np.ascontiguousarray(W.numpy()))
    assert_bits(blockwise.quantize(W).packed.numpy(), expected.packed)


@given(st.integers(1, 8), st.data())
def test_packing(bits, data):
    n, fill = data.draw(st.integers(0, 50)), data.draw(st.integers(0, 2**bits - 1))
    codes = data.draw(hnp.arrays(np.uint8, n, elements=st.integers(0, 2**bits - 1)))
    expected = reference.pack(codes, bits, fill)
    packed = blockwise.pack(torch.from_numpy(codes), bits, fill)
    assert_bits(packed.numpy(), expected)
    assert_bits(blockwise.unpack(packed, bits, n).numpy(), codes)


def refusals(W, values, blocksize):
    with pytest.raises(InputError) as theirs:
        reference.quantize(W, values, blocksize)
    with pytest.raises(InputError) as ours:
        blockwise.quantize(torch.from_numpy(W), torch.from_numpy(values), blocksize)
    return str(ours.value), str(theirs.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_in_the_same_words(bad):
    W = np.ones((3, 5), np.float32)
    W[1, 2] = W[2, 4] = bad
    ours, theirs = refusals(W, codebook.NF4, 4)
    assert ours == theirs


@pytest.mark.parametrize("blocksize", [0, -64, 3, 96])
def test_a_bad_block_size_is_refused_in_the_same_words(blocksize):
    ours, theirs = refusals(np.ones(4, np.float32), codebook.NF4, blocksize)
    assert ours == theirs


def test_a_bad_codebook_is_refused_in_the_same_words():
    ours, theirs = refusals(np.ones(4, np.float32), codebook.NF4[1:], 64)
    assert ours == theirs


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("part", ["packed", "absmax"])
def test_a_part_of_another_size_is_refused_in_the_same_words(part, change):
    W = np.ones((3, 7), np.float32)
    theirs = reference.quantize(W, codebook.NF4, 4)
    ours = blockwise.quantize(torch.from_numpy(W), blocksize=4)
    right = getattr(theirs, part)
    wrong = np.resize(right, right.size + change)
    theirs = replace(theirs, **{part: wrong})
    ours = replace(ours, **{part: torch.from_numpy(wrong)})
    with pytest.raises(InputError) as said:
        reference.dequantize(theirs)
    with pytest.raises(InputError) as repeated:
        blockwise.dequantize(ours)
    assert str(repeated.value) == str(said.value)


def test_the_weight_keeps_its_gradient_and_its_values():
    W = torch.randn(5, 7, requires_grad=True)
    before = W.detach().clone()
    q = blockwise.quantize(W)
    assert torch.equal(W, before)
    assert not q.absmax.requires_grad
