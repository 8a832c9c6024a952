"""An adapter that was read from a folder, with the names of the base's tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import peft_stacks
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import About
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
    """

    updates: Mapping[str, Update]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, About]) -> "Adapter":
        """Return the adapter by the names that a base has for the same tensors.

        Checkpoints of transformers 4 and 5 put `model.` in different places.

        Args:
            names: of the base's tensors, with their shapes.

        Raises:
            InputError: an update belongs to no tensor of the base; the sentence names
                the first.
        """
        updates = {_found(n, names): u for n, u in self.updates.items()}
        for module, parts in self.stacks.items():
            updates |= peft_stacks.updates(module, parts, self.config, names)
        return Adapter(
            updates,
            {_found(n, names): b for n, b in self.biases.items()},
            {_found(n, names, new=True): t for n, t in self.saved.items()},
            self.config,
            self.metadata,
        )


def _found(name: str, names: Mapping[str, object], new: bool = False) -> str:
    found = counterpart(name, names)
    if found is None and not new:
        raise InputError(
            f"the adapter changes {name}, which the base does not have; give the base "
            "that it was trained on"
        )
    return found or name
