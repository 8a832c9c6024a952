"""The published 4-bit tables, and the form in which the kernels read any codebook."""

from dataclasses import dataclass

import numpy as np

from minipeft.errors import InputError

NF4 = np.array(
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
    ],
    dtype=np.float32,
)

# In the order of its bits: zero stands at codes 0 and 8.
FP4 = np.array(
    [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32
) / np.float32(12)


def dynamic_map(signed: bool = True) -> np.ndarray:
    """Return the 256 ascending values of the dynamic 8-bit data type.

    Powers of ten times the midpoints of even steps from 0.1 to 1, twice as many at each
    power, of both signs or of one; then 0 and 1. Every operation rounds to float32.

    Source: 8-bit optimizers (arXiv:2110.02861), section 1.3.
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for exponent in range(-6, 1):
        steps = 2 ** (exponent + 6 if signed else exponent + 7)
        edges = _even_steps(steps)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        fractions = np.float32(10.0**exponent) * middles
        values += [fractions, -fractions] if signed else [fractions]
    return np.sort(np.concatenate(values))


def _even_steps(steps: int) -> np.ndarray:
    # Counted from the nearer end, product and sum rounded once, as the table was made.
    low, high = np.float64(np.float32(0.1)), np.float64(1)
    step = np.float64(np.float32((high - low) / steps))
    i = np.arange(steps + 1)
    upper = i >= (steps + 1) // 2
    return np.where(upper, high - step * (steps - i), low + step * i).astype(np.float32)


def midpoints_of_map(signed: bool) -> np.ndarray:
    """Return the 255 boundaries of the dynamic map's values, and +inf."""
    values = dynamic_map(signed)
    between = (values[:-1] + values[1:]) / np.float32(2)
    return np.append(between, np.float32(np.inf))


@dataclass(frozen=True)
class Sorted:
    """A codebook of up to 16 values as `quantize` searches it.

    Args:
        midpoints: 16 ascending float32; those that the codebook has not are +inf.
        order: 16 nibbles; nibble p is the code at position p of the sorted values.
        bits: of a code.
    """

    midpoints: np.ndarray
    order: int
    bits: int


def code_bits(size: int) -> int:
    """Return the width of a code of a codebook of 2, 4, 8 or 16 values.

    Raises:
        InputError: at another size.
    """
    if size not in (2, 4, 8, 16):
        raise InputError(
            f"the codebook has {size} values; the kernels take 2, 4, 8 or 16."
        )
    return size.bit_length() - 1


def sort(codebook: np.ndarray) -> Sorted:
    """Sort by value; equal values keep their order, as FP4's two zeros need.

    Raises:
        InputError: if the codebook is not 2, 4, 8 or 16 float32 values.
    """
    if codebook.dtype != np.float32 or codebook.ndim != 1:
        raise InputError(
            f"the codebook is {codebook.dtype}{list(codebook.shape)}; give float32 in "
            "one dimension."
        )
    bits = code_bits(codebook.size)
    order = np.argsort(codebook, kind="stable")
    values = codebook[order]
    midpoints = np.full(16, np.inf, np.float32)
    midpoints[: values.size - 1] = (values[:-1] + values[1:]) / np.float32(2)
    nibbles = sum(int(code) << 4 * position for position, code in enumerate(order))
    return Sorted(midpoints, nibbles, bits)
