"""An adapter that was read from a folder, with the names of the base's tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import apart, peft_stacks
from minipeft.interop.peft_update import WIDE
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import About, Tensors
from minipeft.interop.update import Update


@dataclass(frozen=True)
class Adapter:
    """The input of a merge, by the names of the base's tensors.

    Args:
        updates: of weights.
        biases: the changes of biases, already scaled.
        saved: tensors that replace those of the base.
        config: as it was read.
        metadata: of the file.
        stacks: matrices of stacks of experts, by module and by their names in it; which
            stack each belongs to, the base says (`renamed`).
        tables: weights of the base that the file holds beside their updates, as peft
            writes embeddings and heads; they change nothing (`check_tables`).
    """

    updates: Mapping[str, Update]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, About]) -> "Adapter":
        """Return the adapter by the names that a base has for the same tensors.

        Checkpoints of transformers 4 and 5 put `model.` in different places.

        Args:
            names: of the base's tensors, with their shapes.

        Raises:
            InputError: an update belongs to no tensor of the base, or to one of another
                shape or of integers; the sentence names the first.
        """
        updates = {_found(n, names): u for n, u in self.updates.items()}
        lone = apart.stacks(names) if self.stacks else {}
        both = {**names, **{name: stack.about for name, stack in lone.items()}}
        for module, parts in self.stacks.items():
            found = peft_stacks.updates(module, parts, self.config, both, lone)
            for name, update in found.items():
                own = {name: update}
                updates |= lone[name].split(update) if name in lone else own
        biases = {_found(n, names): b for n, b in self.biases.items()}
        for name, update in updates.items():
            _check(name, update, names[name])
        for name, bias in biases.items():
            _check_shape(name, tuple(bias.shape), names[name])
        saved = {_found(n, names, new=True): t for n, t in self.saved.items()}
        for name in _lone_biases(saved, names):
            _check_shape(name, tuple(saved[name].shape), names[name])
        tables = {_found(n, names): t for n, t in self.tables.items()}
        facts = self.config, self.metadata
        return Adapter(updates, biases, saved, *facts, tables=tables)

    def check_tables(self, base: Tensors) -> None:
        """Refuse a base with other embeddings than those in the file.

        Args:
            base: whose names the adapter has.

        Raises:
            InputError: a table differs.
        """
        for name, table in self.tables.items():
            own = base.read(name)
            if own.shape != table.shape or not torch.equal(own, table.to(own.dtype)):
                raise InputError(
                    f"the adapter holds {name} of another base; give the base that it "
                    "was trained on"
                )


def _found(name: str, names: Mapping[str, object], new: bool = False) -> str:
    found = counterpart(name, names)
    if found is None and not new:
        raise InputError(
            f"the adapter changes {name}, which the base does not have; give the base "
            "that it was trained on"
        )
    return found or name


def _lone_biases(saved: Mapping[str, Tensor], names: Mapping[str, About]) -> list[str]:
    """Return the biases that are replaced while their weights stay."""
    ends = [name for name in saved if name.endswith(".bias") and name in names]
    return [n for n in ends if f"{n.removesuffix('.bias')}.weight" not in saved]


def _check(name: str, update: Update, about: About) -> None:
    *experts, rows, columns = *update.B.shape[:-1], update.A.shape[-1]
    sides = (columns, rows) if update.transposed else (rows, columns)
    _check_shape(name, (*experts, *sides), about)
    m = update.magnitude
    if m is not None and m.numel() != rows:
        raise InputError(
            f"the magnitude of {name} has {m.numel()} numbers and its B {rows} rows; "
            "get the adapter again"
        )


def _check_shape(name: str, shape: tuple[int, ...], about: About) -> None:
    if shape != about.shape:
        raise InputError(
            f"{name} has shape {about.shape} in the base, and the adapter changes one "
            f"of shape {shape}; give the base that it was trained on"
        )
    if about.dtype not in WIDE:
        dtype = str(about.dtype).removeprefix("torch.")
        raise InputError(
            f"{name} holds {dtype}; give the base in a float dtype of at least 16 bits"
        )
