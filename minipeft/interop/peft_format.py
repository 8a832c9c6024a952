"""Adapters in the format of Hugging Face's peft: `adapter_config.json` and one file.

Only safetensors and JSON are read. The keys are peft's: `base_model.model.` before the
path of the module, `.lora_A.weight` and so on behind it.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import peft_folder
from minipeft.interop.adapter import Adapter
from minipeft.interop.peft_folder import CONFIG, PREFIX, Contents
from minipeft.interop.update import Update

LARGEST = sys.float_info.max
KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|"
    r"lora_embedding_A|lora_embedding_B)(?:\.(?P<kind>weight|bias))?"
)


def read(folder: Path) -> Adapter:
    """Return the adapter of a folder.

    Raises:
        InputError: a file is absent or damaged, holds a number that is not finite, or
            the method is one that changes no weight.
    """
    contents = peft_folder.read(folder)
    config = contents.config
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{folder} holds an adapter of type {config.get('peft_type')!r}, which has "
            "no matrices A and B; only LoRA and DoRA are merged from files"
        )
    return _adapter(contents)


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


def _adapter(contents: Contents) -> Adapter:
    config = contents.config
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in contents.tensors.items():
        found = KEY.fullmatch(key.removeprefix(PREFIX))
        if found is None:
            saved[_plain(key)] = tensor
        else:
            part = found["part"] + (".bias" if found["kind"] == "bias" else "")
            parts.setdefault(found["module"], {})[part] = tensor
    updates, biases = {}, {}
    for module, found_parts in parts.items():
        found_update = update(module, found_parts, config)
        updates[f"{module}.weight"] = found_update
        if "lora_B.bias" in found_parts:
            biases[f"{module}.bias"] = (
                found_update.scaling * found_parts["lora_B.bias"].float()
            )
    return Adapter(updates, biases, saved, config, contents.metadata)


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
    magnitude = parts.get("lora_magnitude_vector")
    alpha = matched(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    if not is_number(alpha):
        raise InputError(f"lora_alpha of {module} is {alpha!r}; give a finite number")
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not len(A):
        raise InputError(
            f"{module}: A has shape {tuple(A.shape)} and B {tuple(B.shape)}; they must "
            "be (r, in_features) and (out_features, r)"
        )
    r = matched(config.get("rank_pattern") or {}, module, config.get("r"))
    if not isinstance(r, int) or r * experts != A.shape[0]:
        raise InputError(
            f"{module} has rank {A.shape[0] // experts} in the file and {r!r} in "
            f"{CONFIG}; one of them belongs to another adapter"
        )
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    stabilized = bool(config.get("use_rslora"))
    flat = None if magnitude is None else magnitude.reshape(-1)
    return Update(A, B, float(alpha), stabilized, flat, transposed)


def _plain(key: str) -> str:
    """Return the base's name of a tensor that the adapter replaces."""
    name = key.removeprefix(PREFIX)
    return name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
