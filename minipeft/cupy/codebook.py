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
