"""What other implementations answer where they differ from ours for a reason."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from minipeft.golden.tensors import Array
from minipeft.reference import blockwise
from minipeft.reference.codebook import FP4

F32 = np.float32

# The thresholds of bitsandbytes' CUDA kernel. A compiler rounds the decimals to float32
# at once, and four of them end one step beside the midpoint of the table's values.
_NF4_THRESHOLDS = (
    "-0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544 "
    "-0.23460740596055984 -0.13791173323988914 -0.045525018125772476 "
    "0.03979014977812767 0.1202552504837513 0.2035212516784668 0.2920137718319893 "
    "0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784181118011"
)

# Its thresholds between the magnitudes of FP4, ascending, and their codes.
_FP4_THRESHOLDS = np.array(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333],
    dtype=np.float32,
)
_FP4_CODES = np.array([0, 1, 6, 7, 4, 5, 2, 3], dtype=np.uint8)

SMALLEST_SCALE = F32(1e-38)  # of bitsandbytes' CPU code

Parts = tuple[Array, Array]  # packed, absmax


def ways(W: Array, codebook: Array, blocksize: int) -> Iterator[tuple[str, Parts]]:
    """Yield what others answer, by the name of their way."""
    blocks, absmax = _blocks(W, blocksize)
    size, zero = W.size, absmax == 0
    divisor = np.where(zero, F32(1), absmax)[:, np.newaxis]
    codes = blockwise.nearest(blocks / divisor, codebook)
    yield "division", (_packed(codes, size), absmax)
    if size % blocksize and (absmax >= 2.0**-126).all():
        full = blockwise.nearest(blocks * (F32(1) / divisor), codebook)
        full[-1] = codes[-1]
        yield "division-of-short-blocks", (_packed(full, size), absmax)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = blocks * (F32(1) / absmax[:, np.newaxis])
    finite = np.where(np.isnan(scaled), F32(0), scaled)  # zero blocks
    if (absmax[~zero] >= 2.0**-126).all():  # below, the kernel's reciprocal overflows
        yield from _cuda(finite, zero, codebook, size, absmax)
    codes = blockwise.nearest(finite, codebook)
    for name, scale in (("1", F32(1)), ("eps", SMALLEST_SCALE)):
        filled = np.where(zero, scale, absmax)
        yield f"zero-block-scale-{name}", (_packed(codes, size), filled)


def _cuda(
    scaled: Array, zero: Array, codebook: Array, size: int, absmax: Array
) -> Iterator[tuple[str, Parts]]:
    """Yield the kernel's answer; 0/0 fails every comparison, which leaves code 0."""
    if codebook is FP4:
        above = np.abs(scaled)[..., np.newaxis] > _FP4_THRESHOLDS
        sign = np.where(scaled < 0, np.uint8(8), np.uint8(0))
        codes = _FP4_CODES[above.sum(axis=-1)] + sign
        yield "fp4-by-magnitude", (_packed(codes, size), absmax)
        return
    codes = np.searchsorted(nf4_thresholds(), scaled, side="left").astype(np.uint8)
    yield "cuda-thresholds", (_packed(codes, size), absmax)
    codes = blockwise.nearest(scaled, codebook)
    codes[zero] = 0
    yield "zero-block-code-0", (_packed(codes, size), absmax)


def nf4_thresholds() -> Array:
    """Return the float32 number next to each decimal: one rounding, as a compiler's."""
    return np.array([_nearest_float(text) for text in _NF4_THRESHOLDS.split()], F32)


def _nearest_float(text: str) -> np.floating:
    exact, near = Fraction(text), F32(float(text))
    steps = [np.nextafter(near, F32(-1)), near, np.nextafter(near, F32(1))]
    return min(steps, key=lambda value: abs(Fraction(float(value)) - exact))


def _blocks(W: Array, blocksize: int) -> tuple[Array, Array]:
    flat = W.astype(F32).reshape(-1)
    blocks = np.zeros((-(-flat.size // blocksize), blocksize), F32)
    blocks.reshape(-1)[: flat.size] = flat
    return blocks, np.abs(blocks).max(axis=1, initial=0)


def _packed(codes: Array, size: int) -> Array:
    """Pack the codes of a tensor; the spare code is that of a padding 0."""
    return blockwise.pack(codes.reshape(-1)[: size + size % 2].astype(np.uint8), 4)
