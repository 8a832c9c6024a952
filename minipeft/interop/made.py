"""The origin of a file, in its metadata: base, method, constants, data, seed, versions.

An adapter on another base computes another function. So a file contains a hash of each
tensor of its base. Loading the file on another base names the tensor that differs.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from minipeft import __version__
from minipeft.errors import InputError, OtherBaseError
from minipeft.interop import fingerprint
from minipeft.interop.adapter import Adapter
from minipeft.interop.fingerprint import BASE, Fingerprint, of_tensor
from minipeft.torch.inject import adapted
from minipeft.torch.operands import has_values

METHOD, CONSTANTS = "minipeft.method", "minipeft.constants"
DATA, SEED, VERSIONS = "minipeft.data", "minipeft.seed", "minipeft.versions"
TARGET = "minipeft.target"
"""The key with the weights that a merge into a 4-bit base began and ended with."""
UNKNOWN = (
    "the adapter does not say which base it was made for, so another base of the same "
    "shapes is not noticed"
)

NOT_COMPARED = "the base was not compared with the one that the adapter was made for"
ANYWAY = "pass allow_base_mismatch=True if you mean it"


@dataclass(frozen=True)
class Made:
    """The facts about a training that only the caller knows.

    Args:
        data: a hash of the training data; empty: not known.
        seed: of the training; None: not known.
    """

    data: str = ""
    seed: int | None = None


def metadata(
    base: Fingerprint, method: str, constants: Mapping[str, Any], made: Made
) -> dict[str, str]:
    """Return the metadata of a file about its origin."""
    found = {BASE: base.to_json(), **facts(method, constants)}
    if made.data:
        found[DATA] = made.data
    if made.seed is not None:
        found[SEED] = str(made.seed)
    return found


def facts(method: str, constants: Mapping[str, Any]) -> dict[str, str]:
    """Return the part of the metadata that every writer knows."""
    versions = {
        "minipeft": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }
    return {
        METHOD: method,
        CONSTANTS: json.dumps(dict(constants), sort_keys=True),
        VERSIONS: json.dumps(versions, sort_keys=True),
    }


def origin(
    adapter: Adapter,
    base: Fingerprint | None = None,
    more: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the metadata of a file made from an adapter: the adapter's, and the base.

    Args:
        adapter: that was merged, or is written for another program.
        base: into which it was merged; None: the one that the adapter names, if any.
        more: metadata besides, such as the target of a merge into a 4-bit base.
    """
    scales = {f"{name}.scaling": u.scaling for name, u in adapter.updates.items()}
    kept = (METHOD, CONSTANTS, DATA, SEED, BASE, TARGET)
    own = {key: adapter.metadata[key] for key in kept if key in adapter.metadata}
    written = facts(str(adapter.config.get("peft_type", "LORA")), scales)
    of_base = {BASE: base.to_json()} if base else {}
    return {**written, **own, **of_base, **(more or {})}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model without its adapters, by their names in files.

    A tensor with several names appears only under the first one, as in files of
    transformers.
    """
    layers = adapted(model)
    found: dict[int, tuple[str, Tensor]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = _own_name(key, layers)
        if name is not None:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def of_base(model: nn.Module, without: Collection[str] = ()) -> Fingerprint:
    """Hash the tensors of a model without its adapters.

    Args:
        model: adapted or not.
        without: names of trained tensors that the file contains.

    Raises:
        InputError: a tensor is offloaded, or sharded over processes.
    """
    tensors = base_tensors(model)
    for name, tensor in tensors.items():
        sharded = hasattr(tensor, "placements")
        if sharded or not has_values(tensor):
            how = "sharded over processes" if sharded else "on the device meta"
            raise InputError(
                f"{name} is {how}, and its values identify the base; save and load "
                "adapters of a model that is in memory, before it is offloaded or "
                "distributed"
            )
    return Fingerprint(
        {name: of_tensor(tensors[name]) for name in sorted(tensors.keys() - {*without})}
    )


def checked(
    found: Mapping[str, str], model: nn.Module, brought: Collection[str] = ()
) -> str:
    """Refuse a base that is not the file's; return a line about the base.

    Args:
        found: the metadata of a file.
        model: into which the file is loaded.
        brought: names of the model's tensors that the file replaces.

    Raises:
        OtherBaseError: the file was made for another base; the message names the first
            tensor that differs.
    """
    if BASE in found:
        saved = Fingerprint.from_json(found[BASE])
        try:
            fingerprint.check(saved, of_base(model), brought)
        except OtherBaseError as error:
            raise OtherBaseError(error.found, ANYWAY) from None
    return about_base(found)


def about_base(found: Mapping[str, str]) -> str:
    """Return a line about a base that was compared, if the file names one.

    Args:
        found: the metadata of a file.
    """
    if BASE not in found:
        return UNKNOWN
    whole = Fingerprint.from_json(found[BASE]).whole
    return f"the base is the one that the adapter was made for ({whole[:12]})"


def _own_name(key: str, layers: Collection[str]) -> str | None:
    """Return the name in the model's own files, or None for a part of an adapter."""
    for layer in layers:
        prefix = f"{layer}." if layer else ""
        if key.startswith(prefix):
            rest = key.removeprefix(prefix)
            if rest.startswith("adapters."):
                return None
            return prefix + rest.removeprefix("base.")
    return key
