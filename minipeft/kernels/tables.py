"""Codebooks and settings in the form that the kernels read."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from minipeft.errors import InputError
from minipeft.kernels.checks import code_bits


@dataclass(frozen=True)
class Sorted:
    """A codebook of up to 16 values, sorted for the search in `quantize`.

    Args:
        midpoints: 16 ascending float32; unused places hold +inf.
        order: 16 nibbles; nibble p is the code at position p of the sorted values.
        bits: of a code.
    """

    midpoints: np.ndarray
    order: int
    bits: int


def sort(codebook: np.ndarray) -> Sorted:
    """Sort by value; equal values (FP4 has two zeros) keep their order.

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
    midpoints[: values.size - 1] = _between(values)
    nibbles = sum(int(code) << 4 * position for position, code in enumerate(order))
    return Sorted(midpoints, nibbles, bits)


def midpoints(values: np.ndarray) -> np.ndarray:
    """Return the boundaries of ascending values, and +inf."""
    return np.append(_between(values), np.float32(np.inf))


def tree(values: np.ndarray) -> np.ndarray:
    """Return the boundaries of ascending values as a search tree.

    The tree is stored level by level (Eytzinger): node 1 is the root, the children of
    node k are 2 k and 2 k + 1, and element 0 is not used. The number of values is a
    power of two.
    """
    depth = values.size.bit_length() - 1
    nodes = np.zeros(values.size, np.float32)
    for level in range(depth):
        first, step = 1 << level, 1 << (depth - level)
        nodes[first : 2 * first] = _between(values)[step // 2 - 1 :: step]
    return nodes


def moment_maps(signed: np.ndarray, unsigned: np.ndarray) -> np.ndarray:
    """Return the values and the search trees of the maps of m and v, as one array."""
    parts = [f(v) for v in (signed, unsigned) for f in (np.asarray, tree)]
    return np.concatenate(parts)


def adamw_settings(group: Mapping[str, Any], t: int) -> list[float]:
    """Return the factors of a step in float64; the kernel's arguments round them once.

    Args:
        group: `lr`, `betas`, `eps` and `weight_decay`.
        t: the number of the step, from 1.
    """
    (beta1, beta2), lr = group["betas"], group["lr"]
    return [
        1 - lr * group["weight_decay"],
        1 - beta1,
        beta2,
        1 - beta2,
        -(lr / (1 - beta1**t)),
        sqrt(1 - beta2**t),
        group["eps"],
    ]


def _between(values: np.ndarray) -> np.ndarray:
    return (values[:-1] + values[1:]) / np.float32(2)
