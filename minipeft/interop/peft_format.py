"""Adapters in the format of Hugging Face's peft: `adapter_config.json` and one file.

Only safetensors and JSON are read. The keys are peft's: `base_model.model.` before the
path of the module, `.lora_A.weight` and so on behind it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import peft_folder, peft_stacks
from minipeft.interop.adapter import Adapter
from minipeft.interop.peft_folder import PREFIX, Contents
from minipeft.interop.peft_settings import FIELDS, check_update
from minipeft.interop.peft_update import update

KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector|"
    r"lora_embedding_A|lora_embedding_B)(?:\.(?P<kind>weight|bias))?"
)


PART = re.compile(r"\.(?:lora|hira|vera|ia3|miss|oft|hada|lokr)_")
"""What stands in the names of an adapter's parts."""


def read(folder: str | Path) -> Adapter:
    """Return the adapter of a folder.

    Raises:
        InputError: a file is absent or damaged, holds a number that is not finite, or
            the method is one that changes no weight.
    """
    contents = peft_folder.read(folder)
    config = contents.config
    kind = config.get("peft_type")
    if kind != "LORA":
        remedy = (
            "write it as plain LoRA first: minipeft export --to peft --rank or --share"
            if isinstance(kind, str) and kind in FIELDS
            else "only LoRA and DoRA are merged from files"
        )
        raise InputError(
            f"{folder} holds an adapter of type {kind!r}, which has no matrices A and "
            f"B; {remedy}"
        )
    check_update(config)
    return _adapter(contents)


def _adapter(contents: Contents) -> Adapter:
    config = contents.config
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    for key, tensor in contents.tensors.items():
        found = KEY.fullmatch(key.removeprefix(PREFIX))
        if found is None:
            _check_whole(key, config)
            (tables if ".base_layer." in key else saved)[plain(key)] = tensor
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
        _check_parts(module, found_parts, config)
        found_update = update(module, found_parts, config)
        updates[f"{module}.weight"] = found_update
        if "lora_B.bias" in found_parts:
            biases[f"{module}.bias"] = (
                found_update.scaling * found_parts["lora_B.bias"].float()
            )
    saved |= {name: tables.pop(name) for name in tables.keys() - updates.keys()}
    return Adapter(updates, biases, saved, config, contents.metadata, stacks, tables)


def _check_whole(key: str, config: Mapping[str, Any]) -> None:
    """Refuse a tensor that is a part of an adapter, and replaces none of the base."""
    if ".token_adapter." in key:
        raise InputError(
            f"{key} holds rows of tokens, which are not merged from files; merge the "
            "adapter with the library that trained it"
        )
    if PART.search(key):
        raise InputError(
            f"{key} is a part of an adapter, and its name is none of LoRA's in peft's "
            "files, such as ….lora_A.weight; give it the name that peft would"
        )


def _check_parts(
    module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    for name, part in {
        "use_dora": "lora_magnitude_vector",
        "lora_bias": "lora_B.bias",
    }.items():
        # A layer without a bias of its own has none beside B.
        lost = name == "use_dora" and bool(config.get(name)) and part not in parts
        if lost or (part in parts and not config.get(name)):
            there = "does not have" if lost else "has"
            raise InputError(
                f"{name} is {config.get(name)!r}, and the file {there} {part} of "
                f"{module}; get the adapter again"
            )


def plain(key: str) -> str:
    """Return the base's name of a tensor that the adapter replaces."""
    name = key.removeprefix(PREFIX)
    return name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
