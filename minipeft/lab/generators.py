"""All random generators of a run, saved so that a resumed run draws the same numbers.

These are torch's on the CPU and on each device of the model, those that modules hold,
Python's and NumPy's.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.interop.tensors import bytes_of


def states(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of each generator by name."""
    version, words, rest = random.getstate()
    mersenne: Any = np.random.get_state(legacy=False)  # noqa: NPY002  # others use it
    found = {
        "python": torch.tensor([version, *words]),
        "python/gauss": _spare(rest),
        "numpy": torch.tensor(
            [*map(int, mersenne["state"]["key"]), int(mersenne["state"]["pos"])]
        ),
        "numpy/gauss": _spare(mersenne["gauss"] if mersenne["has_gauss"] else None),
        "torch": torch.get_rng_state(),
    }
    for device, module in _devices(model):
        found[f"torch/{device}"] = module.get_rng_state(device).cpu()
    for name, generator in _held(model):
        found[name] = generator.get_state().cpu()
    return found


def check(saved: dict[str, Tensor], model: nn.Module) -> None:
    """Refuse saved states that do not belong to the generators of this run.

    Raises:
        InputError: a generator is missing in the run or in the file, or differs.
    """
    own = states(model)
    for name in sorted(own.keys() | saved.keys()):
        if name not in own:
            raise InputError(
                f"it was drawn from the generator {name}, which is not here; resume "
                "on the device where the run began"
            )
        if name not in saved or saved[name].shape[:1] != own[name].shape[:1]:
            raise InputError(f"it lacks the state of the generator {name}")


def restore(saved: dict[str, Tensor], model: nn.Module) -> None:
    """Set every generator to its saved state, after `check`."""
    words = [int(word) for word in saved["python"]]
    gauss = _spared(saved["python/gauss"])
    random.setstate((words[0], tuple(words[1:]), gauss))
    *key, position = (int(word) for word in saved["numpy"])
    spare = _spared(saved["numpy/gauss"])
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, np.uint32), "pos": position},
            "has_gauss": int(spare is not None),
            "gauss": spare or 0.0,
        }
    )
    torch.set_rng_state(saved["torch"])
    for device, module in _devices(model):
        module.set_rng_state(saved[f"torch/{device}"], device)
    for name, generator in _held(model):
        generator.set_state(saved[name])


@contextmanager
def undrawn(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Set every generator back at the end; yield a test whether one has moved."""
    before = states(model)
    try:
        yield lambda: any(
            bytes_of(state) != bytes_of(before[name])
            for name, state in states(model).items()
        )
    finally:
        restore(before, model)


def _devices(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the devices of the model that have a generator of their own."""
    kinds = {str(p.device) for p in model.parameters() if p.device.type != "cpu"}
    for device in sorted(kinds):
        module = torch.get_device_module(torch.device(device).type)
        if hasattr(module, "get_rng_state"):
            yield device, module


def _held(model: nn.Module) -> Iterator[tuple[str, torch.Generator]]:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Generator):
                yield f"{name}.{key}".lstrip("."), value


def _spare(value: float | None) -> Tensor:
    """The normal number that Python and NumPy store for the next call, or NaN."""
    return torch.tensor([float("nan") if value is None else value], dtype=torch.float64)


def _spared(state: Tensor) -> float | None:
    value = float(state)
    return None if value != value else value
