"""An adapter that was read from a folder, with the names of the base's tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minipeft.errors import InputError
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
    """

    updates: Mapping[str, Update]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, object]) -> "Adapter":
        """Return the adapter by the names that a base has for the same tensors.

        Checkpoints of transformers 4 and 5 put `model.` in different places.

        Raises:
            InputError: an update belongs to no tensor of the base; the sentence names
                the first.
        """
        return Adapter(
            {_found(n, names): u for n, u in self.updates.items()},
            {_found(n, names): b for n, b in self.biases.items()},
            {_found(n, names, new=True): t for n, t in self.saved.items()},
            self.config,
            self.metadata,
        )


def counterpart(name: str, names: Mapping[str, object]) -> str | None:
    """Return the name under which `names` holds the same tensor, or None."""
    for candidate in _spellings(name):
        if candidate in names:
            return candidate
    return None


def _found(name: str, names: Mapping[str, object], new: bool = False) -> str:
    found = counterpart(name, names)
    if found is None and not new:
        raise InputError(
            f"the adapter changes {name}, which the base does not have; give the base "
            "that it was trained on"
        )
    return found or name


def _spellings(name: str) -> list[str]:
    """Return the names that one tensor has had in checkpoints over time."""
    inner = name.replace("model.language_model.", "language_model.model.")
    outer = name.replace("language_model.model.", "model.language_model.")
    short = name.removeprefix("model.")
    return [name, inner, outer, short, f"model.{name}", f"base_model.{name}"]
