"""Fast look-ups for eager code on a CPU: a table replaces a search.

`torch.bucketize` needs about 20 ns to search 16 values for one number. The leading bits
of a float32 select an interval that contains at most one boundary, so one comparison is
enough. The result equals that of the search for every float32.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from minipeft.shapes import Float, Inexact, UInt8

WIDEST = 18
"""The largest number of leading bits: 1 MB of boundaries fits the cache."""
KEPT = 2**26
"""Bytes that a thread keeps for a weight; a larger one gets new memory."""


class Bins(NamedTuple):
    """The intervals of float32 numbers that share their leading bits.

    `low` is the code of the numbers of an interval up to its `boundary`. The code of
    the numbers above the boundary differs from `low` in the bits `flip`. In an interval
    without a boundary `flip` is zero.
    """

    bits: int
    boundary: Float[Tensor, " bins"]
    low: UInt8[Tensor, " bins"]
    flip: UInt8[Tensor, " bins"]


def search(x: Float[Tensor, "..."], bins: Bins) -> UInt8[Tensor, "..."]:
    """Return the code of every number, as a search among the boundaries would."""
    flat = x.reshape(-1)
    place = (flat.view(torch.int32) >> (32 - bins.bits)).add_(2 ** (bins.bits - 1))
    above = flat > bins.boundary.index_select(0, place)
    # Instead of the slow `torch.where` on bytes: in bytes, 0 - 1 has all bits set.
    flip = bins.flip.index_select(0, place).bitwise_and_(above.view(torch.uint8).neg())
    return bins.low.index_select(0, place).bitwise_xor_(flip).view(x.shape)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def bins_of(codebook: tuple[float, ...]) -> Bins | None:
    """Return the intervals for the nearest values of a codebook, in order of its codes.

    None if even the largest table has an interval with two boundaries.
    """
    values, order = torch.tensor(codebook, device="cpu").sort(stable=True)
    midpoints = (values[:-1] + values[1:]) / 2
    codes = order.to(torch.uint8)
    for bits in range(8, WIDEST + 1):
        ends = torch.bucketize(torch.stack(_ends(bits)), midpoints)
        first, last = ends.amin(dim=0), ends.amax(dim=0)
        if int((last - first).max()) <= 1:
            none = midpoints.new_full((1,), torch.inf)
            boundary = torch.cat([midpoints, none])[first]
            boundary = torch.where(last > first, boundary, none)
            return Bins(bits, boundary, codes[first], codes[first] ^ codes[last])
    return None


def _ends(bits: int) -> list[Float[Tensor, " bins"]]:
    """Return the first and the last number of every interval, in order of bits."""
    leading = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), device="cpu")
    first = leading << (32 - bits)
    ends = (first, first + 2 ** (32 - bits) - 1)
    # Above the largest number come infinity and NaN, which are refused before.
    magnitudes = [(end & 0x7FFFFFFF).clamp(max=0x7F7FFFFF) for end in ends]
    sign = torch.where(leading < 0, -(2**31), 0)
    return [(m + sign).to(torch.int32).view(torch.float32) for m in magnitudes]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def pairs_of(codebook: tuple[float, ...]) -> Tensor:
    """Return, for every byte of 4-bit codes, its two values as one 64-bit number."""
    values = torch.tensor(codebook, device="cpu")
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack([values[byte >> 4], values[byte & 15]], dim=1)
    return pairs.view(torch.float64).view(-1)


class _Memory(threading.local):
    """Memory that a thread uses again each time it decodes.

    The system clears new memory page by page: for 64 MB that takes three times as long
    as decoding a weight of this size.
    """

    def __init__(self) -> None:
        self.index = _new(0, torch.int32)
        self.found = _new(0, torch.float64)
        self.kept = _new(0, torch.uint8)

    @property
    def nbytes(self) -> int:
        """Count the bytes that this thread keeps."""
        return sum(t.nbytes for t in (self.index, self.found, self.kept))

    def pairs(self, n: int) -> tuple[Tensor, Tensor]:
        """Return room for n indices, and for the pairs that they find."""
        if n > len(self.index):
            self.index, self.found = _new(n, torch.int32), _new(n, torch.float64)
        return self.index[:n], self.found[:n]

    def weight(
        self, shape: Sequence[int], dtype: torch.dtype
    ) -> Inexact[Tensor, "out_features in_features"]:
        """Return room for a weight: until this is called again, it is the caller's."""
        size = prod(shape) * dtype.itemsize
        if size > KEPT:
            return _new(prod(shape), dtype).view(shape)
        if size > len(self.kept):
            self.kept = _new(size, torch.uint8)
        return self.kept[:size].view(dtype).view(shape)


@torch.inference_mode(False)
def _new(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dtype=dtype, device="cpu")


MEMORY = _Memory()
