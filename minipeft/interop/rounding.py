"""How a file rounds its values: a cast, a kind of GGUF, four bits.

A merge is correct if some order of its sums, rounded as the file rounds, gives the
values of the file. `reachable` decides this for values that are known up to a slack.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from minipeft.interop.bitsandbytes_format import Quantized, decode, table_name
from minipeft.torch import blockwise, double_quant
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import dynamic_map

F32 = 2.0**-24


@runtime_checkable
class Rounding(Protocol):
    """The rounding of one tensor of a file."""

    @property
    def name(self) -> str:
        """The name of what the file holds, such as `bfloat16`."""

    def wide(self, W: Tensor) -> Tensor:
        """Return a weight in a dtype that loses nothing before the rounding."""

    def round(self, values: Tensor) -> Tensor:
        """Return the values as they would be read from the file."""

    def reachable(self, found: Tensor, wanted: Tensor, slack: Tensor) -> bool:
        """Return whether values within `slack` of `wanted` are rounded to `found`."""


@runtime_checkable
class Rounded(Protocol):
    """Tensors of a file that stores fewer bits than it returns."""

    def rounding(self, name: str) -> Rounding:
        """Return how the file rounds one tensor."""


@dataclass(frozen=True)
class Cast:
    """One rounding to a floating dtype."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The name of the dtype."""
        return str(self.dtype).removeprefix("torch.")

    def wide(self, W: Tensor) -> Tensor:
        """Return the weight in the wider of the two dtypes."""
        return W.to(torch.promote_types(W.dtype, self.dtype))

    def round(self, values: Tensor) -> Tensor:
        """Return the values in the dtype."""
        return values.to(self.dtype)

    def reachable(self, found: Tensor, wanted: Tensor, slack: Tensor) -> bool:
        """Test both ends of the interval: rounding keeps the order of values."""
        low, high = (self.round(end) for end in (wanted - slack, wanted + slack))
        return bool(((low <= found) & (found <= high)).all())


@dataclass(frozen=True)
class Through(Cast):
    """A rounding to a narrow dtype that is read in a wide one."""

    narrow: torch.dtype = torch.float16

    @property
    def name(self) -> str:
        """The name of the narrow dtype."""
        return str(self.narrow).removeprefix("torch.")

    def wide(self, W: Tensor) -> Tensor:
        """Return the weight in float32."""
        return W.float()

    def round(self, values: Tensor) -> Tensor:
        """Return the values, rounded to the narrow dtype."""
        return values.float().to(self.narrow).to(self.dtype)


BLOCK = 32
"""Values of a row that share a scale in Q8_0."""


@dataclass(frozen=True)
class Q8:
    """Q8_0: 8-bit integers, and one scale in float16 for 32 of them."""

    name = "Q8_0"

    def wide(self, W: Tensor) -> Tensor:
        """Return the weight in float32."""
        return W.float()

    def round(self, values: Tensor) -> Tensor:
        """Return the values as codes times max|x| / 127, a scale kept in float16."""
        blocks = values.float().reshape(-1, BLOCK)
        d = blocks.abs().amax(dim=1, keepdim=True) / 127
        scaled = blocks * torch.where(d == 0, 0, 1 / d)
        # Halves are rounded away from zero, as C's roundf does.
        q = scaled.sign() * (scaled.abs() + 0.5).floor() + 0.0  # an integer has no -0
        return (d.half().float() * q).reshape(values.shape)

    def reachable(self, found: Tensor, wanted: Tensor, slack: Tensor) -> bool:
        """Check the scale of each block, then how far each integer is from x / d."""
        x, s = (t.double().reshape(-1, BLOCK) for t in (wanted, slack))
        held = found.double().reshape(-1, BLOCK)
        low, high = (
            ((x.abs() + sign * s).amax(dim=1, keepdim=True).clamp(min=0) / 127)
            for sign in (-1, 1)
        )
        scale = held.abs().amax(dim=1, keepdim=True) / 127
        near = 2 * F32  # two quotients by 127
        ends = (low * (1 - near)).half().double(), (high * (1 + near)).half().double()
        right = (ends[0] <= scale * (1 + near)) & (scale * (1 - near) <= ends[1])
        q = (held / torch.where(scale == 0, 1, scale)).round()
        least = torch.where(low == 0, torch.inf, low)
        far = (q - x / torch.where(high == 0, 1, high)).abs()
        # x / d lies between the quotients with both ends, after three roundings.
        between = x.abs() / least - x.abs() / torch.where(high == 0, torch.inf, high)
        error = s / least + between + 128 * 4 * F32
        return bool(right.all()) and bool(((far <= 0.5 + error) | (high == 0)).all())


@dataclass(frozen=True)
class FourBits:
    """Blocks of 4-bit codes, with the file's table and block size.

    Args:
        q: the weight in the file.
        dtype: of the weight when it was quantized.
    """

    q: Quantized
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The number of bits, and the table."""
        return f"4 bits ({table_name(self.q.codebook)})"

    def wide(self, W: Tensor) -> Tensor:
        """Return the weight in float32."""
        return W.float()

    def round(self, values: Tensor) -> Tensor:
        """Return the values, rounded to the dtype, quantized and decoded."""
        return decode(quantized_like(self.q, values.to(self.dtype)), self.dtype)

    def reachable(self, found: Tensor, wanted: Tensor, slack: Tensor) -> bool:
        """Check that each code and scale lies between those of both ends."""
        low, high = ((wanted + sign * slack).to(self.dtype) for sign in (-1, 1))
        low, high = (self._blocks(end.double()) for end in (low, high))
        outer = torch.maximum(low.abs(), high.abs())
        inner = torch.where(low * high <= 0, 0.0, torch.minimum(low.abs(), high.abs()))
        most, least = (t.amax(dim=1, keepdim=True) for t in (outer, inner))
        if not self._scales_fit(least.flatten(), most.flatten()):
            return False
        table = self.q.codebook.double()
        codes = blockwise.unpack(self.q.packed.reshape(-1), 4, found.numel())
        held = self._blocks(table[codes.long()])
        step = 4 * F32  # the reciprocal, the product, and the midpoint in float32
        bottom = torch.where(low < 0, low / _not_zero(least), low / _not_zero(most))
        top = torch.where(high < 0, high / _not_zero(most), high / _not_zero(least))
        order = table.sort().values
        middles = (order[:-1] + order[1:]) / 2
        first = order[torch.searchsorted(middles, (bottom - step).clamp(-1, 1))]
        last = order[torch.searchsorted(middles, (top + step).clamp(-1, 1))]
        inside = (first <= held) & (held <= last)
        return bool((inside | (most == 0)).all())

    def _blocks(self, values: Tensor) -> Tensor:
        flat = values.reshape(-1)
        short = -len(flat) % self.q.blocksize
        return torch.nn.functional.pad(flat, (0, short)).reshape(-1, self.q.blocksize)

    def _scales_fit(self, least: Tensor, most: Tensor) -> bool:
        if isinstance(self.q, Blockwise):
            held, gap = self.q.absmax.double(), torch.zeros(())
        else:
            held = double_quant.unnest(self.q).absmax.double()
            table = dynamic_map().double().sort().values
            # One code of a scale: the largest step of the table, times its own scale.
            gap = table.diff().max() * self.q.nested_absmax.double().max()
        near = 4 * F32 * most + gap
        return bool(((least - near <= held) & (held <= most + near)).all())


def quantized_like(q: Quantized, values: Tensor) -> Quantized:
    """Return values in 4 bits, with the table and the block sizes of another weight."""
    if isinstance(q, Blockwise):
        return blockwise.quantize(values, q.codebook, q.blocksize)
    sizes = (q.blocksize, q.nested_blocksize)
    return double_quant.quantize(values, q.codebook, *sizes)


def _not_zero(values: Tensor) -> Tensor:
    return values.clamp(min=torch.finfo(values.dtype).tiny)


def of(tensors: object, name: str, dtype: torch.dtype) -> Rounding:
    """Return how a file rounds one tensor; `dtype` is that of its values."""
    return tensors.rounding(name) if isinstance(tensors, Rounded) else Cast(dtype)
