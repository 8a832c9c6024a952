"""The published codebooks; their values equal those of the reference."""

import numpy as np

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

# In the order of the bits: codes 0 and 8 are both zero.
FP4 = np.array(
    [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32
) / np.float32(12)


def dynamic_map(signed: bool = True) -> np.ndarray:
    """Return the 256 ascending values of the dynamic 8-bit data type.

    Powers of ten times the midpoints of even steps from 0.1 to 1, twice as many at each
    power, of both signs or of one; then 0 and 1. Every operation rounds to float32.

    Source: 8-bit optimizers (arXiv:2110.02861), sections 1.3 and 2.2.
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
