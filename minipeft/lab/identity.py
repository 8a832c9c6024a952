"""The identity of a model: all facts that training does not change, by name.

Two runs can exchange checkpoints if and only if their models have the same identity:
the same classes, constants, configuration, frozen weights and buffers, and trained
parameters of the same names, shapes and dtypes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.interop.tensors import bytes_of
from minipeft.values import check_kind

# Settings that a run may change without changing the model's function.
NOT_THE_FUNCTION = {
    "_name_or_path",
    "architectures",
    "config",  # stored once, as the configuration
    "dtype",
    "gradient_checkpointing",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "training",
    "transformers_version",
    "use_cache",
}
Facts = dict[str, Any]


class Identity:
    """The facts of a model at the start of a run.

    Args:
        model: read once; later changes of the model do not change the facts.
    """

    def __init__(self, model: nn.Module):
        check_kind("model", model, nn.Module)
        self.facts: Facts = dict(_facts(model))
        self._versions = {n: b._version for n, b in model.named_buffers()}

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of all facts."""
        text = json.dumps(self.facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def moved(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the buffers that a run changes: running statistics, counters.

        Buffers of normalization layers always belong to them, other buffers if they
        have changed since the start. A checkpoint saves them together with the
        parameters.
        """
        running = {
            f"{name}.{buffer}".lstrip(".")
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer, _ in module.named_buffers(recurse=False)
        }
        return {
            name: buffer
            for name, buffer in model.named_buffers()
            if name in running or buffer._version != self._versions.get(name)
        }


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of everything that training does not change.

    The hash covers names, classes, constants (scaling, dropout, sides, bits, block
    sizes, seeds), the configuration, frozen weights and all buffers but running
    statistics.
    """
    return Identity(model).fingerprint


def difference(saved: Facts, own: Facts) -> str:
    """Describe the first difference between two models; empty if there is none."""
    for name in sorted(saved.keys() | own.keys()):
        if name not in own:
            return f"it holds {name}, which this model lacks"
        if name not in saved:
            return f"it lacks {name}"
        if saved[name] != own[name]:
            return _changed(name, saved[name], own[name])
    return ""


def _changed(name: str, saved: Any, own: Any) -> str:
    if not isinstance(saved, dict) or not isinstance(own, dict):
        return f"{name} was {saved} and is {own}"
    for key in sorted(saved.keys() | own.keys()):
        if saved.get(key) != own.get(key):
            if key == "values":
                return f"{name} has other values"
            return f"{key} of {name} was {saved.get(key)} and is {own.get(key)}"
    return f"{name} differs"


def _facts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        constants = {
            key: plain
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in NOT_THE_FUNCTION
            for plain in _plain(value)
        }
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        yield f"the module {name}".rstrip(), {"the class": kind, **constants}
    for name, parameter in model.named_parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        about = _about(parameter, values=not parameter.requires_grad)
        yield f"the {kind} parameter {name}", about
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        state = isinstance(owner, nn.modules.batchnorm._NormBase)
        yield f"the buffer {name}", _about(buffer, values=not state)
    yield from _configuration(model)


def _configuration(model: nn.Module) -> Iterator[tuple[str, Any]]:
    # transformers reads some constants from here in its forward passes.
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        fields = config.to_dict()
        for key in NOT_THE_FUNCTION & fields.keys():
            del fields[key]
        yield "the configuration", json.loads(json.dumps(fields, default=str))


def _about(tensor: Tensor, values: bool) -> Facts:
    facts: Facts = {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
    return facts | {"values": _digest(tensor)} if values else facts


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def _plain(value: Any) -> Iterator[Any]:
    """Yield the value for JSON, or nothing if it is no constant."""
    if value is None or isinstance(value, bool | int | float | str):
        yield value
    elif isinstance(value, torch.dtype):
        yield str(value)
    elif isinstance(value, Tensor):
        yield _about(value, values=True)
    elif isinstance(value, list | tuple):
        yield [plain for item in value for plain in _plain(item)]
    elif isinstance(value, dict):
        yield {str(key): p for key, item in value.items() for p in _plain(item)}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        yield from _plain(fields)
