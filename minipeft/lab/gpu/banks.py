"""How long the lanes of a warp wait for one bank of shared memory.

Shared memory has 32 banks, and each gives one word of four bytes a cycle. Lanes that
read the same word share it; different words of one bank come one after another. How
often that happens depends on the values, so it is counted on typical ones.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import numpy as np

from minipeft.cupy.codebook import dynamic_map
from minipeft.kernels import tables
from minipeft.lab import machine_code

BANKS = 32


def passes(words: np.ndarray) -> float:
    """Return how many cycles shared memory needs for a load of a warp, on average.

    Args:
        words: (loads, 32), the number of the word that each lane reads.
    """
    rows = [np.unique(row) % BANKS for row in words]
    return float(np.mean([np.bincount(row).max() for row in rows]))


@cache
def waits(template: str) -> float:
    """Return the cycles per value for which lanes wait for one bank.

    They are those of tables with more words than there are banks; the values are
    normally distributed, a block at a time. All other tables and tiles have at most one
    word in a bank, or all lanes read one word. Left out: where the warps of the 4-bit
    product add their sums, 12 cycles for each 8 rows of x and all columns.
    """
    if template not in SEARCHES:
        return 0.0
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    moments = {True: x, False: x * x} if template == "adamw_8bit" else {True: x}
    total = 0.0
    for signed, values in moments.items():
        scaled = values / abs(values).max(axis=1, keepdims=True)
        midpoints = tables.midpoints(dynamic_map(signed))[:-1]
        position = np.searchsorted(midpoints, scaled).reshape(-1, machine_code.WARP)
        total += sum(passes(words) - 1 for words in SEARCHES[template](position))
    return total


def _tree(position: np.ndarray) -> Iterator[np.ndarray]:
    yield position  # decoding
    for level in range(2, 8):  # the first two levels are in registers
        yield (1 << level) + (position >> (8 - level))


def _sorted(position: np.ndarray) -> Iterator[np.ndarray]:
    for level in range(8):
        step = 128 >> level
        yield position // (2 * step) * (2 * step) + step - 1


SEARCHES: Mapping[str, Callable[[np.ndarray], Iterator[np.ndarray]]] = {
    "adamw_8bit": _tree,
    "nest": _sorted,
}
"""Kernels that look into tables of 256 values: the words that their lanes read."""
