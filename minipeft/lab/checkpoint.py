"""A file to continue a training run: parameters, optimizer, generators, step.

The format is safetensors; its header carries a JSON description under the key
`minipeft`, and under `sha256` a checksum of that description and of every tensor. The
file is written under another name and then renamed, so it is never half written.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minipeft.errors import InputError
from minipeft.interop.tensors import bytes_of
from minipeft.lab import generators
from minipeft.lab.files import write_atomic
from minipeft.lab.identity import Identity, difference, fingerprint
from minipeft.values import check_kind

__all__ = [
    "Progress",
    "check_unused",
    "fingerprint",
    "load_checkpoint",
    "save_checkpoint",
    "trainable",
]

FORMAT = "minipeft-checkpoint"
VERSION = 2
FREE = {"lr", "initial_lr", "betas", "eps", "weight_decay", "momentum", "foreach"}
"""Options of an optimizer that another run may change; its states fit all of them."""

MOMENTS = {"exp_avg", "exp_avg_sq", "m", "v", "momentum_buffer"}
"""Names of states that have the shape of their parameter."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """The progress of a run: everything but parameters and optimizer state.

    `settings` are those of the run that wrote the file (batch shape, accumulation,
    rate). Another run may change them; then it prints a warning.
    """

    step: int
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    settings: dict[str, str] = field(default_factory=dict)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of the trained parameters."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    identity: Identity | None = None,
) -> None:
    """Write a checkpoint atomically.

    Args:
        path: of the file; what is there is replaced.
        model: its trained parameters and its running statistics are saved.
        optimizer: its state is saved.
        progress: is saved too.
        identity: of the model at the start of the run; None computes it now.

    Raises:
        InputError: A parameter or a state is not finite; the folder cannot be written
            or the disk is full. Then the old file is unchanged.
    """
    check_kind("path", path, str, PathLike)
    identity = identity or Identity(model)
    numbers, tensors = _optimizer_state(optimizer)
    tensors |= {f"parameter/{n}": p.detach() for n, p in trainable(model).items()}
    tensors |= {f"buffer/{n}": b for n, b in identity.moved(model).items()}
    _check_finite(path, tensors)
    random = generators.states(model)
    tensors |= {f"random/{name}": state for name, state in random.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "identity": identity.facts,
        "progress": asdict(progress),
        "optimizer": _configuration(optimizer, model),
        "numbers": numbers,
    }
    # safetensors refuses views, and tensors that share memory.
    plain = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
    text = json.dumps(header)
    metadata = {"minipeft": text, "sha256": _checksum(text, plain)}
    write_atomic(path, safetensors.torch.save(plain, metadata=metadata))


def check_unused(path: Path, remedy: str) -> None:
    """Refuse a file that the first save of a new run would replace.

    Args:
        path: of the file.
        remedy: for a checkpoint, how to go on from it or start without it.

    Raises:
        InputError: The file holds a checkpoint, whose step the message names, or other
            content; or the path is a folder, a pipe or a device.
    """
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    _check_regular(path, "choose another path")
    step = _saved_step(path)
    if step is None:
        raise InputError(
            f"{path} exists and is no checkpoint of this program, and a run would "
            "replace it; choose another path"
        )
    raise InputError(
        f"{path} holds a run after step {step}, and a new run would replace it; "
        f"{remedy}"
    )


def _check_regular(path: Path, remedy: str) -> None:
    """Refuse a folder, a pipe or a device: to open a pipe would wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(
            f"{path} exists and is no checkpoint of this program: it is no regular "
            f"file; {remedy}"
        )


def _saved_step(path: Path) -> int | None:
    """Return the step of a checkpoint, by its header alone; None: it is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["minipeft"])
        return _step(header["progress"]["step"]) if header["format"] == FORMAT else None
    except (safetensors.SafetensorError, OSError, KeyError, TypeError):
        return None
    except (ValueError, RecursionError):  # as `_read`, of any JSON
        return None


def _check_finite(path: Path, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(
                f"{name} is not finite, so {path} was not written and holds the last "
                "good state"
            )


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    identity: Identity | None = None,
    steps: int | None = None,
) -> Progress:
    """Put a checkpoint into `model` (and `optimizer`, and the random generators).

    If a part does not fit, nothing is changed.

    Args:
        path: of the file.
        model: with the adapters that the file holds.
        optimizer: of the run; None leaves it and the generators alone.
        identity: of the model, where it was computed before.
        steps: of the run that goes on; None for any number.

    Raises:
        InputError: The file is absent, damaged, from another program or version, or
            belongs to another model, adapter, optimizer or generator, which the
            message names.
    """
    check_kind("path", path, str, PathLike)
    header, tensors = _read(path)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise InputError(
            f"{path} is not a checkpoint of this program ({FORMAT} version {VERSION}); "
            "start again without it"
        )
    with _naming(path):
        _check_kinds(header)
        progress = _progress(header)
        _check_goes_on(progress.step, steps)
        own = _own(model, identity or Identity(model), header, tensors)
        if optimizer is not None:
            state = _fitting_state(optimizer, model, header, tensors)
            random = _part(tensors, "random/")
            generators.check(random, model)
            optimizer.load_state_dict(state)
            generators.restore(random, model)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return progress


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of the message of an error."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{path} does not fit: {error}; use what it was made with, or start again "
            "without it"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path} has a malformed field ({type(error).__name__}: {error}); start "
            "again without it"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Return header and tensors of a file, after checking its checksum."""
    damaged = f"{path} is damaged or not a checkpoint; start again without it"
    _check_regular(path, "start again without it")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint {path}; check the path") from error
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise InputError(damaged) from error
    text = metadata.get("minipeft", "{}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(damaged) from error
    if not isinstance(header, dict):
        raise InputError(damaged)
    if header.get("version") != VERSION:  # with another checksum, or none
        return header, {}
    if metadata.keys() != {"minipeft", "sha256"}:
        raise InputError(damaged)
    if metadata["sha256"] != _checksum(text, tensors):
        raise InputError(
            f"{path} is damaged: its checksum is another one; start again without it"
        )
    return header, tensors


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _check_kinds(header: dict[str, Any]) -> None:
    for name in ("identity", "progress", "optimizer", "numbers"):
        if not isinstance(header.get(name), dict):
            raise ValueError(f"{name} is {type(header.get(name)).__name__}, not a dict")


def _progress(header: dict[str, Any]) -> Progress:
    found = dict(header["progress"])
    known = {f.name for f in fields(Progress)}
    if found.keys() != known:
        odd = ", ".join(sorted(found.keys() ^ known))
        raise ValueError(f"progress has other fields than expected: {odd}")
    validation = [(_step(step), _loss(loss)) for step, loss in found.pop("validation")]
    losses = [_loss(loss) for loss in found.pop("losses")]
    step = _step(found["step"])
    seconds, settings = found["seconds"], found["settings"]
    # A whole number may lie beyond every float.
    if type(seconds) not in (int, float) or not 0 <= seconds <= sys.float_info.max:
        raise ValueError(f"seconds is {seconds!r}")
    if not isinstance(settings, dict) or not all(
        isinstance(value, str) for value in settings.values()
    ):
        raise ValueError(f"settings is {settings!r}")
    return Progress(step, losses, validation, float(seconds), settings)


def _check_goes_on(step: int, steps: int | None) -> None:
    if steps is not None and step > steps:
        raise InputError(
            f"it was saved after step {step}, and the run has {steps} steps"
        )


def _step(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a step is {value!r:.60}, not a whole number from 0")
    return value


def _loss(value: Any) -> float:
    if type(value) is not float:
        raise ValueError(f"a loss is {value!r:.60}, not a number with a point")
    return value


def _own(
    model: nn.Module, identity: Identity, header: dict[str, Any], tensors: Tensors
) -> Tensors:
    """Return the parameters and buffers into which the tensors are loaded."""
    if what := difference(header["identity"], identity.facts):
        raise InputError(what)
    own: Tensors = {f"parameter/{n}": p for n, p in trainable(model).items()}
    buffers = {f"buffer/{n}": b for n, b in model.named_buffers()}
    own |= {name: b for name, b in buffers.items() if name in tensors}
    stored = {n for n in tensors if n.startswith(("parameter/", "buffer/"))}
    if odd := stored ^ own.keys():
        raise InputError(f"{min(odd)} is missing or unexpected")
    for name, tensor in own.items():
        _check_like(name, tensors[name], tensor)
    return own


def _check_like(name: str, saved: Tensor, own: Tensor) -> None:
    if (saved.shape, saved.dtype) != (own.shape, own.dtype):
        raise InputError(
            f"{name} is {saved.dtype} {tuple(saved.shape)}, not {own.dtype} "
            f"{tuple(own.shape)}"
        )


def _optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Any], Tensors]:
    """Return the numbers and the tensors of an optimizer's state, by name."""
    numbers: dict[str, Any] = {}
    tensors: Tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers[f"{index}/{key}"] = value
    return numbers, tensors


def _configuration(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the class, and of each group the names of its parameters and options."""
    names = {id(p): name for name, p in model.named_parameters()}
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    groups = [
        {
            "parameters": [names.get(id(p), "another") for p in group["params"]],
            "options": {
                key: repr(value)
                for key, value in group.items()
                if key != "params" and key not in FREE
            },
        }
        for group in optimizer.param_groups
    ]
    return {"class": kind, "groups": groups}


def _fitting_state(
    optimizer: Optimizer, model: nn.Module, header: dict[str, Any], tensors: Tensors
) -> dict[str, Any]:
    """Return the state for the optimizer, after checking that it is the same one."""
    saved, own = header["optimizer"], _configuration(optimizer, model)
    if saved["class"] != own["class"]:
        raise InputError(f"its optimizer was {saved['class']} and is {own['class']}")
    if len(saved["groups"]) != len(own["groups"]):
        raise InputError(
            f"its optimizer had {len(saved['groups'])} parameter groups and has "
            f"{len(own['groups'])}"
        )
    for then, now in zip(saved["groups"], own["groups"], strict=True):
        if then["parameters"] != now["parameters"]:
            raise InputError("its optimizer had the parameters in another order")
        options = ({"its optimizer": group["options"]} for group in (then, now))
        if what := difference(*options):
            raise InputError(what)
    values = dict(header["numbers"]) | _part(tensors, "optimizer/")
    state: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    _check_states(state, optimizer)
    groups = optimizer.state_dict()["param_groups"]
    return {"state": state, "param_groups": groups}


def _check_states(state: dict[int, dict[str, Any]], optimizer: Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state.items():
        if not index < len(parameters):
            raise InputError(
                f"its optimizer had a parameter {index}, which is not here"
            )
        for key in MOMENTS & values.keys():
            if values[key].shape != parameters[index].shape:
                raise InputError(
                    f"the state {key} of parameter {index} has shape "
                    f"{tuple(values[key].shape)}, not {tuple(parameters[index].shape)}"
                )


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
