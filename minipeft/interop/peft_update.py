"""The change that a layer's parts make, in the terms of peft's settings."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop.update import Update

CONFIG = "adapter_config.json"
WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of a tensor that a merge computes with."""
LARGEST = sys.float_info.max


def matched(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name."""
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    except (AttributeError, re.error):
        raise InputError(
            f"{patterns!r} is no object of patterns and values; mend {CONFIG}"
        ) from None
    return default


def is_number(value: Any) -> bool:
    """Tell whether a setting is a number that float64 holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST


def update(
    module: str,
    parts: Mapping[str, Tensor],
    config: Mapping[str, Any],
    experts: int = 1,
) -> Update:
    """Return the update of a layer from its parts, with its own rank and alpha.

    Args:
        module: its name.
        parts: by their names behind it.
        config: of the adapter.
        experts: how many updates A and B hold together.

    Raises:
        InputError: a part is missing, or the parts and the settings differ.
    """
    embedding = "lora_embedding_A" in parts
    names = (
        ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    )
    missing = [name for name in names if name not in parts]
    if missing:
        raise InputError(f"{module} has no {missing[0]}; get the adapter again")
    A, B = (parts[name] for name in names)
    for name, part in parts.items():
        if part.dtype not in WIDE:
            raise InputError(
                f"{name} of {module} holds {str(part.dtype).removeprefix('torch.')}; "
                "give it in a float dtype of at least 16 bits"
            )
    magnitude = parts.get("lora_magnitude_vector")
    alpha = matched(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    if not is_number(alpha):
        raise InputError(f"lora_alpha of {module} is {alpha!r}; give a finite number")
    r = matched(config.get("rank_pattern") or {}, module, config.get("r"))
    _check_rank(module, A, B, r, experts)
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    stabilized = bool(config.get("use_rslora"))
    flat = None if magnitude is None else magnitude.reshape(-1)
    return Update(A, B, float(alpha), stabilized, flat, transposed)


def _check_rank(module: str, A: Tensor, B: Tensor, r: Any, experts: int) -> None:
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not len(A):
        raise InputError(
            f"{module}: A has shape {tuple(A.shape)} and B {tuple(B.shape)}; they must "
            "be (r, in_features) and (out_features, r)"
        )
    if not isinstance(r, int) or r * experts != A.shape[0]:
        raise InputError(
            f"{module} has rank {A.shape[0] // experts} in the file and {r!r} in "
            f"{CONFIG}; one of them belongs to another adapter"
        )
