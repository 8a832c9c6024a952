"""The folders that a trained model leaves: base, adapter, and an adapter to merge."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.interop import adapterhub_format, peft_folder, peft_model, to_lora
from minipeft.interop.fingerprint import BASE, Fingerprint, of_tensor
from minipeft.interop.made import Made, base_tensors
from minipeft.lab.recipe import RANKED, Recipe
from minipeft.torch.inject import adapted
from minipeft.torch.linear import weight_of
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.virtual import VirtualTokens

ROOMS = {
    "base": "the model without the adapter, 4-bit weights decoded",
    "adapter": "what was trained, in the file format of its method",
    "lora": "the same update as LoRA's two matrices, in DoRA with a magnitude, for the "
    "commands of minipeft; it names base as its base",
    "merged": "base and lora in one model, for any program",
}
"""What the folders of a run hold."""
FILES = ("adapter.gguf", "model.gguf")
"""What lies beside them."""
EXACT = ("lora", "rslora", "qlora", "dora", "pissa", "loftq")
"""The methods whose file is LoRA's, which other programs merge."""
UNMERGED = ("full", "bottleneck", "prefix", "prompt")
"""The methods without an update of a weight: all weights are trained, or none."""


def check_own(folder: Path) -> None:
    """Refuse a folder that a run would replace and that holds more than a run writes.

    Args:
        folder: of the run; it need not be there.

    Raises:
        InputError: something else lies in it, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    others = {path.name for path in folder.glob("*")} - {*ROOMS, *FILES}
    if others:
        raise InputError(
            f"{folder} holds {min(others)}, which no run wrote and this one would "
            "remove with the rest; move it, or choose another --out"
        )


def write_base(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model without its adapters, with tokenizer, as transformers reads it.

    Args:
        model: trained or not; after `full` the folder holds the trained model.
        tokenizer: of the model.
        folder: a new one.
    """
    own = model.model if isinstance(model, VirtualTokens) else model
    folder.mkdir(parents=True)
    own.config.save_pretrained(folder)
    own.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = {n: t.cpu().clone() for n, t in base_weights(own).items()}
    path = folder / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that the adapters stand on, 4-bit ones decoded.

    A merge with these gives what was trained, also where the original weights are
    other ones.
    """
    layers = {name: layer.base for name, layer in adapted(model).items()}
    inside = {f"{name}.base" for name in layers}
    modules = {n: layers.get(n, m) for n, m in model.named_modules() if n not in inside}
    coded = {n: m for n, m in modules.items() if isinstance(m, QuantizedLinear)}
    decoded = {f"{n}.weight": weight_of(m).detach() for n, m in coded.items()}
    parts = {f"{n}.{part}" for n, m in coded.items() for part in m.state_dict()}
    parts -= {f"{n}.bias" for n in coded}
    plain = {n: t.detach() for n, t in base_tensors(model).items() if n not in parts}
    return plain | decoded


def write_adapter(model: nn.Module, use: Recipe, made: Made, folder: Path) -> None:
    """Write what was trained in the file format of its method.

    Args:
        model: trained by a method other than `full`.
        use: its settings.
        made: what is known of the training.
        folder: a new one.

    Raises:
        InputError: the method's format does not hold it.
    """
    if use.method == "bottleneck":
        adapterhub_format.save(model, folder)
    else:
        peft_model.save(model, folder, made=made)


def write_lora(model: nn.Module, use: Recipe, made: Made, folder: Path) -> None:
    """Write the trained update as LoRA, for what merges and exports files.

    The method's own file where it is LoRA's; the factors of the update where its rank
    is known; else of every rank, which loses rounding alone. The file names the base
    of `write_base`.

    Args:
        model: trained by a method that is not in `UNMERGED`.
        use: its settings.
        made: what is known of the training.
        folder: a new one.
    """
    if use.method in EXACT:
        found = peft_model.contents_of(model, made=made)
    elif use.method in RANKED:
        found = to_lora.to_lora(model, rank=use.rank, made=made).contents
    else:
        found = to_lora.to_lora(model, share=1.0, made=made).contents
    weights = base_weights(model)
    print_of = Fingerprint({n: of_tensor(weights[n]) for n in sorted(weights)})
    metadata = {**found.metadata, BASE: print_of.to_json()}
    peft_folder.write(folder, replace(found, metadata=metadata))


def described(folder: Path, method: str) -> Iterator[str]:
    """Yield a line for each folder of a run that is there: what it holds.

    Args:
        folder: of the run.
        method: that was trained.
    """
    full = {"base": "the trained model"} if method == "full" else {}
    for name, about in (ROOMS | full).items():
        if (folder / name).is_dir():
            yield f"  {name}: {about}"
