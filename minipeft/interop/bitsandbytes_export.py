"""Write base + adapter as a 4-bit checkpoint that transformers loads with bitsandbytes.

The adapter is merged first, as in every other export. Then each weight of a layer is
quantized to NF4 with double quantization. 4 bits lose most of a small update.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minipeft.errors import InputError, cannot_write
from minipeft.interop import bitsandbytes_format, merging
from minipeft.interop.adapter import Adapter
from minipeft.interop.tensors import INDEX, About, Shards, Tensors, writing
from minipeft.torch import double_quant

LAYER = re.compile(r"(?:.+\.)?layers\.\d+\..+_proj\.weight")
"""The weights that transformers takes for 4-bit linear layers in these families."""


def write_model(
    base: str | Path,
    adapter: Adapter,
    out: str | Path,
    step: Callable[[str], None] = lambda name: None,
) -> int:
    """Write the folder of a 4-bit model; return how many weights have 4 bits.

    Args:
        base: a model's folder.
        adapter: what to merge.
        out: the new folder; it must not exist.
        step: is called with the name of each tensor, for progress.

    Raises:
        InputError: the folder exists, the adapter does not fit the base, or the base
            has no weight to quantize.
    """
    base, out = Path(base), Path(out)
    if out.exists():
        raise InputError(f"{out} exists; choose another folder, or remove it")
    part = merging.beside(out)
    try:
        merging.merge(base, adapter, part / "merged", step=step)
        merged = Shards(part / "merged")
        names = [name for name in merged.about if LAYER.fullmatch(name)]
        if not names:
            raise InputError(
                f"{base} has no weights named layers.N.….…_proj.weight; export "
                "safetensors, and let transformers quantize them as it loads"
            )
        _write(part / "packed", merged, set(names), step)
        (part / "packed").rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(names)


def _write(
    folder: Path, merged: Shards, names: set[str], step: Callable[[str], None]
) -> None:
    shutil.copytree(
        merged.path, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX)
    )
    # Two passes: the header of the file comes first, and only one tensor is in memory.
    about = {}
    for name in merged.about:
        for key, tensor in _parts(name, merged, names).items():
            about[key] = About(tensor.dtype, tuple(tensor.shape))
    path = folder / "model.safetensors"
    with writing(
        path, about, {"format": "pt", "minipeft.target": "requantized"}
    ) as file:
        for name in merged.about:
            for key, tensor in _parts(name, merged, names).items():
                file.write(key, tensor)
            step(name)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    dtype = merged.about[min(names)].dtype
    config["quantization_config"] = _quantization(dtype)
    merging.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _parts(name: str, merged: Tensors, names: set[str]) -> dict[str, Tensor]:
    W = merged.read(name)
    if name not in names:
        return {name: W}
    return bitsandbytes_format.write(name, double_quant.quantize(W), W.dtype)


def _quantization(dtype: torch.dtype) -> dict[str, object]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
