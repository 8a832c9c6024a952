"""The storages of tensors as they come and go, in their order.

On the device `meta` nothing is computed or stored, so a model of any size can be
recorded. Tensors inside a kernel are not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Event(NamedTuple):
    """A storage of `size` bytes comes, or, without a size, goes."""

    key: int
    size: int | None = None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that comes to be inside, and its end wherever it ends.

    Attributes:
        events: what was noted so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.known: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and note the storages of what it returns."""
        found = func(*args, **(kwargs or {}))
        self.note(t for t in tree_leaves(found) if isinstance(t, Tensor))
        return found

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Note the storages of these tensors, those that are new."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            at = storage._cdata
            if at not in self.known:
                self.known[at] = key = len(self.events)
                self.events.append(Event(key, storage.nbytes()))
                weakref.finalize(storage, self._ends, at, key)

    def _ends(self, at: int, key: int) -> None:
        self.known.pop(at, None)
        self.events.append(Event(key))


def live(events: Iterable[Event]) -> tuple[int, int]:
    """Return the most bytes that live at one time, and those that live at the end.

    Args:
        events: whole: what goes has come before.
    """
    sizes: dict[int, int] = {}
    now = most = 0
    for key, size in events:
        now += -sizes.pop(key) if size is None else size
        if size is not None:
            sizes[key] = size
        most = max(most, now)
    return most, now
