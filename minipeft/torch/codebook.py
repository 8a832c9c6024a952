"""The values that a few bits stand for, as tensors: NF4, FP4, NF3, NF2, dynamic map."""

from functools import cache

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.shapes import Float
from minipeft.torch.operands import check_tensors
from minipeft.values import check_flag, check_integer, check_number

Codebook = Float[Tensor, " codes"]


@torch.inference_mode(False)
def table(values: list[float]) -> Codebook:
    """Return a codebook on the CPU that is no part of any graph."""
    # A plain tensor on the CPU, also if another default device is set when this file is
    # imported; `quantize` copies the tensor to the device of the weight.
    return torch.tensor(values, dtype=torch.float32, device="cpu")


# The published numbers: the published formula gives other last bits, because the
# numbers were computed from float32 probabilities (see `normal_float`).
NF4: Codebook = table(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)

# Sign, two exponent bits, one mantissa bit; divided by 12. The order is that of the
# bits, so the values are not sorted, and codes 0 and 8 are both +0.
_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
FP4: Codebook = table([twelfths / 12 for twelfths in _TWELFTHS])


@torch.inference_mode(False)
def normal_float(bits: int, offset: float = 929 / 960) -> Codebook:
    """Return quantiles of the standard normal distribution, divided by the largest.

    Formula and arguments: `reference.codebook.normal_float`.

    Raises:
        InputError: if `bits` or `offset` is out of range.

    Source: QLoRA (arXiv:2305.14314), section 3 and appendix E.
    """
    check_integer("bits", bits, 2, 8)
    check_number("offset", offset)
    if not 0.5 < offset < 1:
        raise InputError(f"offset is {offset}; choose a probability in (1/2, 1).")
    half = 2 ** (bits - 1)
    positive = _quantiles(offset, half + 1)
    negative = -_quantiles(offset, half)
    values = torch.cat([negative, torch.zeros_like(positive[:1]), positive.flip(0)])
    return (values / values.max()).float()


@torch.inference_mode(False)
def dynamic_map(signed: bool = True) -> Codebook:
    """Return the 256 values of the dynamic 8-bit data type, ascending, in float32.

    Formula and arguments: `reference.codebook.dynamic_map`.

    Source: 8-bit optimizers (arXiv:2110.02861), sections 1.3 and 2.2.
    """
    check_flag("signed", signed)
    values = [table([0.0, 1.0])]
    for i in range(7):
        edges = _linspace32(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        fractions = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [fractions, -fractions] if signed else [fractions]
    return torch.cat(values).sort().values


@cache
def dynamic_map_on(device: torch.device, signed: bool = True) -> Codebook:
    """Return the dynamic map on a device; the first call copies it there."""
    with torch.inference_mode(False):  # a later backward pass may use the tensor
        return dynamic_map(signed).to(device)


def code_bits(codebook: Float[Tensor, " codes"]) -> int:
    """Return the number of bits of a code; no value is read.

    Raises:
        InputError: if the codebook is not one axis of 2, 4, 8, 16 … 256 floats.
    """
    check_tensors({"the codebook": (codebook, "codes")})
    bits = len(codebook).bit_length() - 1
    if len(codebook) != 2**bits or not 1 <= bits <= 8:
        raise InputError(
            f"the codebook has {len(codebook)} values; give 2, 4, 8, 16 … 256 of them."
        )
    return bits


def _quantiles(offset: float, points: int) -> Float[Tensor, " points"]:
    p = torch.linspace(offset, 0.5, points, dtype=torch.float64, device="cpu")
    return torch.special.ndtri(p[:-1])


def _linspace32(start: float, stop: float, points: int) -> Codebook:
    # The bits of `torch.linspace` in float32 on a CPU with a fused multiply-add. On a
    # CPU without one, `torch.linspace` returns other last bits.
    first, last = table([start, stop]).double()
    step = ((last - first) / (points - 1)).float().double()
    i = torch.arange(points, device="cpu")
    rising, falling = first + step * i, last - step * (points - 1 - i)
    return torch.where(i < points // 2, rising, falling).float()


NF3: Codebook = normal_float(3)
NF2: Codebook = normal_float(2)
