"""Refuse `save_pretrained` of a changed model, because it could not be loaded again.

`from_pretrained` finds weights by their names, and the weights of a changed model have
other names: it would warn and start from random weights. So each module with a
`save_pretrained` gets a method on its instance that raises an error. `state_dict` works
as before.

A program that keeps the state of a run, such as the `Trainer` of transformers, passes
`state_dict`. For it the method writes a file of the tensors by their names, from which
the program can go on, and a `config.json` at which `from_pretrained` raises an error.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import ref

from torch import Tensor, nn

from minipeft.errors import InputError, cannot_write

METHOD = "save_pretrained"
FILE = "model.safetensors"
NOTE = (
    "a run with adapters or few bits; load its tensors with "
    "model.load_state_dict(tensors, strict=False), as tied ones are kept once"
)
NO_MODEL = {"model_type": "minipeft", "vocab_size": NOTE, "hidden_size": NOTE}


class Refusal:
    """The method that replaces `save_pretrained`; it reports its first reason.

    It does not keep its module alive, and a copy belongs to the copied module.
    """

    def __init__(self, module: nn.Module, reasons: tuple[str, ...]):
        self.module, self.reasons = ref(module), reasons

    def __call__(self, *args: Any, **settings: Any) -> None:
        """Refuse, unless a program keeps its state."""
        if "state_dict" not in settings:
            raise InputError(f"save_pretrained is refused: {self.reasons[0]}")
        folder = args[0] if args else settings["save_directory"]
        if settings.get("is_main_process", True):
            _write(Path(folder), settings["state_dict"] or self._tensors())

    def _tensors(self) -> Mapping[str, Tensor]:
        module = self.module()
        return {} if module is None else module.state_dict()

    def __getstate__(self) -> tuple[nn.Module | None, tuple[str, ...]]:
        return self.module(), self.reasons

    def __setstate__(self, state: tuple[nn.Module, tuple[str, ...]]) -> None:
        self.module, self.reasons = ref(state[0]), state[1]


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    once: dict[tuple[Any, ...], str] = {}  # tied weights share their memory
    for name, tensor in tensors.items():
        own = not tensor.numel() or tensor.is_meta
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        once.setdefault((name,) if own else place, name)
    kept: dict[str, Tensor] = {}
    memories: set[int] = set()
    for name in once.values():
        memory = tensors[name].untyped_storage().data_ptr()
        kept[name] = _alone(name, tensors[name], memory in memories)
        memories.add(memory)
    text = json.dumps(NO_MODEL, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(kept, folder / FILE, metadata={"format": "pt"})
        (folder / "config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder, error) from error


def _alone(name: str, tensor: Tensor, shared: bool) -> Tensor:
    if tensor.is_meta:
        raise InputError(
            f"{name} is on the device meta and has no values; load the model first"
        )
    # A part of a larger memory is copied: safetensors takes no two that overlap.
    part = shared or tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.detach().contiguous().clone() if part else tensor.contiguous()


def refuse(model: nn.Module, reason: str) -> None:
    """Make `save_pretrained` of the model and of its parts raise an error."""
    for module in model.modules():
        if hasattr(type(module), METHOD):
            reasons = dict.fromkeys((reason, *_reasons(module)))
            vars(module)[METHOD] = Refusal(module, tuple(reasons))


def allow(model: nn.Module, reason: str) -> None:
    """Remove one reason; after the last one the method of the class works again."""
    for module in model.modules():
        left = tuple(r for r in _reasons(module) if r != reason)
        if left:
            vars(module)[METHOD] = Refusal(module, left)
        elif _reasons(module):
            del vars(module)[METHOD]


def _reasons(module: nn.Module) -> tuple[str, ...]:
    held = vars(module).get(METHOD)
    return held.reasons if isinstance(held, Refusal) else ()
