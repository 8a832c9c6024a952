"""A table instead of a search: the same code for every float32."""

import pytest
import torch

from minipeft.errors import InputError
from minipeft.torch import blockwise
from minipeft.torch.bins import bins_of, pairs_of, search
from minipeft.torch.codebook import FP4, NF4, dynamic_map, normal_float

BOOKS = {
    "NF4": NF4,
    "FP4": FP4,
    "NF2": normal_float(2),
    "NF8": normal_float(8),
    "signed map": dynamic_map(),
    "unsigned map": dynamic_map(signed=False),
}


def searched(x, codebook):
    values, order = codebook.sort(stable=True)
    midpoints = (values[:-1] + values[1:]) / 2
    return order.to(torch.uint8)[torch.bucketize(x, midpoints)]


def hard_numbers(codebook):
    """Every boundary, its neighbours, all ends of intervals, and random numbers."""
    values = codebook.sort().values
    midpoints = (values[:-1] + values[1:]) / 2
    up, down = (
        torch.nextafter(midpoints, torch.full_like(midpoints, end))
        for end in (torch.inf, -torch.inf)
    )
    bits = torch.arange(-(2**17), 2**17, dtype=torch.int64) << 14
    ends = torch.cat([bits, bits + 2**14 - 1]).to(torch.int32).view(torch.float32)
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (2**18,), generator=draw)
    drawn = drawn.to(torch.int32).view(torch.float32)
    rest = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45])
    x = torch.cat([midpoints, up, down, ends, drawn, rest])
    return x[x.isfinite()]


@pytest.mark.parametrize("name", BOOKS)
def test_a_table_finds_what_a_search_finds(name):
    codebook = BOOKS[name]
    bins = bins_of(tuple(codebook.tolist()))
    assert bins is not None
    x = hard_numbers(codebook)
    assert torch.equal(search(x, bins), searched(x, codebook))


def test_values_too_close_for_a_table_are_searched():
    close = torch.tensor([-1.0, 0.5, 0.5 + 2**-24, 1.0])
    crowded = torch.cat([close, torch.tensor([0.5 + 2**-23, 2.0, 3.0, 4.0])])
    assert bins_of(tuple(crowded.tolist())) is None
    x = torch.linspace(-1, 4, 5000)
    assert torch.equal(blockwise.nearest(x, crowded), searched(x, crowded))


def test_what_is_no_float32_is_searched():
    x = torch.linspace(-1, 1, 5000, dtype=torch.float64)
    assert torch.equal(blockwise.nearest(x, NF4), searched(x, NF4))


@pytest.mark.parametrize("size", [15, 512])
def test_a_search_in_no_codebook_is_refused(size):
    with pytest.raises(InputError, match=f"the codebook has {size} values"):
        blockwise.nearest(torch.zeros(1), torch.linspace(-1, 1, size))


def test_pairs_are_the_values_of_a_byte():
    pairs = pairs_of(tuple(FP4.tolist())).view(torch.float32).view(256, 2)
    byte = torch.arange(256)
    assert torch.equal(pairs, torch.stack([FP4[byte >> 4], FP4[byte & 15]], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codebook", [NF4, FP4], ids=["NF4", "FP4"])
def test_slices_are_seamless(dtype, codebook, monkeypatch):
    W = torch.randn(96, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    whole = blockwise.quantize(W, codebook)
    decoded = blockwise.dequantize(whole, dtype)
    for slice_ in (64, 256, 1024, W.numel() // 2):
        monkeypatch.setattr(blockwise, "SLICE", slice_)
        monkeypatch.setattr(blockwise, "DECODED", slice_)
        q = blockwise.quantize(W, codebook)
        assert torch.equal(q.packed, whole.packed)
        assert torch.equal(q.absmax, whole.absmax)
        assert torch.equal(blockwise.dequantize(q, dtype), decoded)
    monkeypatch.setattr(blockwise, "on_cpu", lambda tensor: False)
    q = blockwise.quantize(W, codebook)
    assert torch.equal(q.packed, whole.packed)
    assert torch.equal(blockwise.dequantize(q, dtype), decoded)
