"""Experts that a checkpoint keeps apart, seen as the stacks that the model has.

Checkpoints name each expert's matrices; transformers 5 stacks them when it loads them,
and an adapter of the loaded model holds one pair A, B for a stack. Here the same stacks
are made from the names alone, and each is read from its experts when it is needed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop.rounding import Rounded
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import PIECE, About, Tensors
from minipeft.interop.update import Update

PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""The matrices of an expert, one under the other in a stack: two ways to call them."""
MATRIX = re.compile(
    r"(?P<owner>.+\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.weight", re.ASCII
)


@dataclass(frozen=True)
class Stack:
    """A stack of experts that lie apart.

    Args:
        members: of each expert, the names of its matrices, from the first row down.
        rows: of each of these matrices.
        about: of the stack: (experts, out_features, in_features).
    """

    members: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]
    about: About

    def split(self, update: Update) -> dict[str, Update]:
        """Return the update of each matrix: all of A, and its rows of B."""
        found: dict[str, Update] = {}
        for e, names in enumerate(self.members):
            one = update.expert(e)
            parts = torch.split(one.B, [*self.rows])
            found |= {n: replace(one, B=B) for n, B in zip(names, parts, strict=True)}
        return found


def stacks(names: Mapping[str, About]) -> dict[str, Stack]:
    """Return the stacks of all experts that lie apart, by their names in a model.

    Args:
        names: of a checkpoint's tensors, with their shapes.

    Raises:
        InputError: an expert lacks a matrix, or has one of another shape or dtype.
    """
    owners: dict[str, dict[str, int]] = {}
    for name in names:
        matrix = MATRIX.fullmatch(name)
        if matrix is not None:
            counts = owners.setdefault(matrix["owner"], {})
            number = int(matrix["expert"]) + 1
            counts[matrix["part"]] = max(counts.get(matrix["part"], 0), number)
    return {
        f"{owner}.{stack}": _stack(owner, parts, max(counts.values()), names)
        for owner, counts in owners.items()
        for stack, ways in PARTS.items()
        for parts in ways
        if parts[0] in counts
    }


def _stack(
    owner: str, parts: tuple[str, ...], experts: int, names: Mapping[str, About]
) -> Stack:
    members = tuple(
        tuple(f"{owner}.{e}.{part}.weight" for part in parts) for e in range(experts)
    )
    first = [names.get(name) for name in members[0]]
    for expert in members:
        for name, own in zip(expert, first, strict=True):
            if own is None or len(own.shape) != 2 or names.get(name) != own:
                raise InputError(
                    f"{name} is missing, or of another shape than expert 0's; get the "
                    "base again"
                )
    known = [own for own in first if own is not None]
    rows = tuple(own.shape[0] for own in known)
    shape = (experts, sum(rows), known[0].shape[1])
    return Stack(members, rows, About(known[0].dtype, shape))


class Stacked:
    """Tensors of a file, with stacks in the place of experts that lie apart.

    Args:
        source: of the tensors.
        found: the stacks.
    """

    def __init__(self, source: Tensors, found: Mapping[str, Stack]):
        self._source, self.stacks = source, found
        members = {n for s in found.values() for n in chain.from_iterable(s.members)}
        kept = {n: about for n, about in source.about.items() if n not in members}
        self.about: Mapping[str, About] = {
            **kept,
            **{name: stack.about for name, stack in found.items()},
        }
        self.metadata: Mapping[str, str] = source.metadata

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        if name not in self.stacks:
            return self._source.read(name)
        members = self.stacks[name].members
        return torch.stack(
            [torch.cat([self._source.read(n) for n in one]) for one in members]
        )

    def pieces(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, a piece at a time."""
        if name not in self.stacks:
            yield from self._source.pieces(name, size)
            return
        whole, filled = memoryview(bytearray(size)), 0
        for member in chain.from_iterable(self.stacks[name].members):
            for piece in self._source.pieces(member, size):
                # A piece of a matrix ends one piece of the stack and begins another.
                for part in (piece[: size - filled], piece[size - filled :]):
                    whole[filled : filled + len(part)] = part
                    filled += len(part)
                    if filled == size:
                        yield whole
                        filled = 0
        if filled:
            yield whole[:filled]


def stacked(tensors: Tensors) -> Tensors:
    """Return the tensors, with stacks in the place of experts that lie apart.

    Raises:
        InputError: an expert lacks a matrix, or the file rounds each to few bits.
    """
    found = stacks(tensors.about)
    if found and isinstance(tensors, Rounded):
        raise InputError(
            "the file keeps its experts apart and in few bits, and the other file "
            "keeps them in stacks; give the merged model in safetensors"
        )
    return Stacked(tensors, found) if found else tensors


def named_as(names: Mapping[str, object], tensors: Tensors) -> Tensors:
    """Return the tensors, with stacks if `names` has stacks of their lone experts."""
    lone = stacks(tensors.about)
    return stacked(tensors) if any(counterpart(n, names) for n in lone) else tensors


def alike(one: Tensors, other: Tensors) -> tuple[Tensors, Tensors]:
    """Return both with stacks, if one has them and the other keeps experts apart.

    Raises:
        InputError: as `stacked`.
    """
    lone = [bool(stacks(tensors.about)) for tensors in (one, other)]
    if lone[0] == lone[1]:
        return one, other
    return stacked(one), stacked(other)
