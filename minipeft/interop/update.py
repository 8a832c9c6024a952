"""The change of one tensor by an adapter's file, and the correct merge of the two.

An update holds what the file holds: the matrices, alpha, and how the base stores the
weight. The audit compares files with the result of `merged`, which has the formulas of
`torch.lora` and `torch.dora`, computed block by block of rows, or in a wider dtype.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minipeft.interop.tensors import About, Tensors, rows
from minipeft.torch import lora
from minipeft.torch.dora import over_norm

ROWS = 256
"""Rows of a weight that are merged at a time."""


@dataclass(frozen=True)
class Update:
    r"""LoRA's change of one weight, or DoRA's where there is a magnitude.

    Args:
        A: (r, in_features); of a stack of experts, (experts, r, in_features).
        B: (out_features, r); of a stack, (experts, out_features, r).
        alpha: numerator of the scaling.
        rank_stabilized: whether the scaling is alpha / sqrt(r) and not alpha / r.
        magnitude: DoRA's length of each output row, or None.
        transposed: whether the base stores the weight as (in_features, out_features),
            as Conv1D and embeddings do.
    """

    A: Tensor
    B: Tensor
    alpha: float
    rank_stabilized: bool = False
    magnitude: Tensor | None = None
    transposed: bool = False

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[-2]

    @property
    def scaling(self) -> float:
        r"""$\alpha / r$, or $\alpha / \sqrt r$."""
        return lora.scaling(self.alpha, self.r, self.rank_stabilized)

    def expert(self, number: int) -> "Update":
        """Return the update of one expert of a stack."""
        return replace(self, A=self.A[number], B=self.B[number])


def merged(W: Tensor, update: Update) -> Tensor:
    """Return the merged weight, computed in float32 and rounded once to W's dtype."""
    if W.ndim == 3:
        return torch.stack([merged(W[e], update.expert(e)) for e in range(len(W))])
    plain = read(W, update)
    result = torch.empty_like(plain)
    blocks = Blocks(update, plain.dtype)
    for start in range(0, len(plain), ROWS):
        block = slice(start, start + ROWS)
        result[block] = blocks.merged(plain[block], start)
    return stored(result, update)


class Blocks:
    """Merges one weight, at most `ROWS` of its rows at a time.

    The rows stay in the cache from the product to the rounding, and every block is
    computed in the memory of the block before.

    Args:
        update: of the weight, which is no stack.
        dtype: of the weight.
    """

    def __init__(self, update: Update, dtype: torch.dtype):
        self._update, self._A = update, update.A.float()
        size = min(ROWS, len(update.B)), update.A.shape[1]
        self._V = torch.empty(size)
        # A sum with 16 bits would convert W in fresh memory, which is slow.
        self._wide = torch.empty(size) if dtype.itemsize < 4 else None

    def merged(self, W: Tensor, start: int) -> Tensor:
        """Return merged rows in float32; the next call overwrites them.

        Args:
            W: (rows, in_features), of the weight.
            start: number of the first of the rows.
        """
        update, block = self._update, slice(start, start + len(W))
        V = torch.mm(update.B[block].float(), self._A, out=self._V[: len(W)])
        if self._wide is not None:
            W = self._wide[: len(W)].copy_(W)
        V.mul_(update.scaling).add_(W)
        if update.magnitude is not None:
            V *= over_norm(update.magnitude[block].float(), row_norm(V))[:, None]
        return V


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: a block is too small for threads to wait for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_rows(update: Update, about: About) -> bool:
    """Return whether a weight can be merged some of its rows at a time.

    Args:
        update: of the weight.
        about: the weight, as it is stored.
    """
    return len(about.shape) == 2 and not update.transposed


def merged_rows(base: Tensors, name: str, update: Update) -> Iterator[Tensor]:
    """Yield the rows of a merged weight in float32, `ROWS` at a time.

    Args:
        base: that has the weight.
        name: of the weight.
        update: of the weight; see `in_rows`.
    """
    blocks, start = Blocks(update, base.about[name].dtype), 0
    for W in rows(base, name, ROWS):
        yield blocks.merged(W, start)  # which the next rows overwrite
        start += len(W)


def exact(W: Tensor, update: Update, dtype: torch.dtype) -> Tensor:
    """Return the merged weight as (out_features, in_features), in a wide dtype.

    LoRA: W + s B A. DoRA: m_i V_i / |V_i| with V = W + s B A, and 0 for a zero row.
    """
    V = read(W, update).to(dtype) + delta(update, dtype)
    if update.magnitude is None:
        return V
    return over_norm(update.magnitude.to(dtype), row_norm(V))[:, None] * V


def delta(update: Update, dtype: torch.dtype) -> Tensor:
    """Return s B A."""
    return update.scaling * (update.B.to(dtype) @ update.A.to(dtype))


def row_norm(V: Tensor) -> Tensor:
    """Return the norm of each output row, over in_features."""
    return torch.linalg.vector_norm(V, dim=1)


def read(stored_weight: Tensor, update: Update) -> Tensor:
    """Return the stored weight as (out_features, in_features)."""
    return stored_weight.T if update.transposed else stored_weight


def stored(W: Tensor, update: Update) -> Tensor:
    """Return W the way the base stores it."""
    return W.T if update.transposed else W
