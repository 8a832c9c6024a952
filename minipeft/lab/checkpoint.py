"""One file that continues a training run: parameters, optimizer, random state, step.

The format is safetensors; its header carries a JSON description under the key
`minipeft`. One file and one rename: a checkpoint is the old one or the new one,
never half of each.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.lab.files import write_atomic

FORMAT = "minipeft-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Progress:
    """How far a run has come: all that is neither a parameter nor optimizer state."""

    step: int
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of what training changes."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of what training does not change, and of every name and shape.

    Two runs can exchange checkpoints if and only if their fingerprints agree.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        kind = "trainable" if parameter.requires_grad else "frozen"
        digest.update(
            f"{kind} {name} {parameter.dtype} {[*parameter.shape]}\n".encode()
        )
        if not parameter.requires_grad:
            plain = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write a checkpoint atomically.

    Raises:
        InputError: The folder cannot be written or the disk is full.
    """
    tensors = {f"parameter/{n}": p.detach() for n, p in trainable(model).items()}
    numbers: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers[f"{index}/{key}"] = value
    tensors["random"] = torch.get_rng_state()
    header = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(model),
        "progress": vars(progress),
        "optimizer": numbers,
    }
    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain, metadata={"minipeft": json.dumps(header)})
    write_atomic(path, data)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Progress:
    """Put a checkpoint into `model` (and `optimizer`, and torch's random state).

    Nothing is changed unless all of it fits.

    Raises:
        InputError: The file is absent, damaged, from another program or version, or
            belongs to another base model or other adapters.
    """
    header, tensors = _read(path)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise InputError(
            f"{path} is not a checkpoint of this program ({FORMAT} version {VERSION}); "
            "start again without it"
        )
    parameters = trainable(model)
    shapes = {f"parameter/{n}": p.shape for n, p in parameters.items()}
    stored = {n: t.shape for n, t in tensors.items() if n.startswith("parameter/")}
    if shapes != stored or header["fingerprint"] != fingerprint(model):
        raise InputError(
            f"{path} belongs to another base model or other adapters; "
            "load the model it was trained on, or start again without it"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    if optimizer is not None:
        _restore(optimizer, header["optimizer"], tensors)
        torch.set_rng_state(tensors["random"])
    progress = header["progress"]
    validation = [(int(step), loss) for step, loss in progress.pop("validation")]
    return Progress(validation=validation, **progress)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return header and tensors of any safetensors file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("minipeft", "{}"))
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint {path}; check the path") from error
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise InputError(
            f"{path} is damaged or not a checkpoint; start again without it"
        ) from error


def _restore(
    optimizer: torch.optim.Optimizer,
    numbers: dict[str, Any],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Rebuild the optimizer's state; its groups stay as the caller configured them."""
    values: dict[str, Any] = dict(numbers)
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            values[name.removeprefix("optimizer/")] = tensor
    state: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
