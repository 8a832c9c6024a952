"""Adapters in the format of Hugging Face's peft: `adapter_config.json` and one file.

Only safetensors and JSON are read. The keys are peft's: `base_model.model.` before the
path of the module, `.lora_A.weight` and so on behind it.
"""

import re
from pathlib import Path

from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import peft_folder, peft_stacks
from minipeft.interop.adapter import Adapter
from minipeft.interop.peft_folder import PREFIX, Contents
from minipeft.interop.peft_update import update

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


def _adapter(contents: Contents) -> Adapter:
    config = contents.config
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in contents.tensors.items():
        found = KEY.fullmatch(key.removeprefix(PREFIX))
        if found is None:
            saved[plain(key)] = tensor
        else:
            part = found["part"] + (".bias" if found["kind"] == "bias" else "")
            parts.setdefault(found["module"], {})[part] = tensor
    stacks: dict[str, dict[str, Tensor]] = {}
    for module in [*parts]:
        owner, level = peft_stacks.owner(module)
        if peft_stacks.parameters(owner, config):
            own = {f"{level}{part}": t for part, t in parts.pop(module).items()}
            stacks.setdefault(owner, {}).update(own)
    updates, biases = {}, {}
    for module, found_parts in parts.items():
        found_update = update(module, found_parts, config)
        updates[f"{module}.weight"] = found_update
        if "lora_B.bias" in found_parts:
            biases[f"{module}.bias"] = (
                found_update.scaling * found_parts["lora_B.bias"].float()
            )
    return Adapter(updates, biases, saved, config, contents.metadata, stacks)


def plain(key: str) -> str:
    """Return the base's name of a tensor that the adapter replaces."""
    name = key.removeprefix(PREFIX)
    return name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
