"""Write base + adapter as a 4-bit checkpoint that transformers loads with bitsandbytes.

The adapter is merged first, as in every other export. Then each weight of a layer is
quantized: to NF4 with double quantization, or as a 4-bit base had quantized it. 4 bits
lose most of a small update.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minipeft.errors import InputError, cannot_write
from minipeft.interop import bitsandbytes_format, merging, quantized_base
from minipeft.interop.adapter import Adapter
from minipeft.interop.bitsandbytes_format import FourBitTensors
from minipeft.interop.fingerprint import BASE, Fingerprint, Hashing
from minipeft.interop.made import TARGET
from minipeft.interop.rounding import quantized_like
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import INDEX, About, Shards, writing
from minipeft.torch import double_quant

LAYER = re.compile(r"(?:.+\.)?layers\.\d+\..+_proj\.weight")
"""The weights that transformers takes for 4-bit linear layers in these families."""
QUANTIZED = "quantized"
"""The target of a merge into plain weights that is quantized at the end."""


def write_model(
    base: str | Path,
    adapter: Adapter,
    out: str | Path,
    step: Callable[[str], None] = lambda name: None,
) -> int:
    """Write the folder of a 4-bit model; return how many weights have 4 bits.

    Args:
        base: a model's folder, of plain or of 4-bit weights.
        adapter: what to merge.
        out: the new folder; it must not exist.
        step: is called with the name of each tensor, for progress.

    Raises:
        InputError: the folder exists, the adapter does not fit the base, or the base
            has no weight to quantize.
    """
    base, out = Path(base), Path(out)
    merging.check_new(out)
    part = merging.beside(out)
    try:
        packing = _packing(base, adapter, part / "merged", step)
        _write(part / "packed", packing, step)
        (part / "packed").rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(packing.names)


@dataclass(frozen=True)
class _Packing:
    """A merged model, and how its weights become 4 bits.

    Args:
        merged: the folder of plain weights.
        names: of the weights that get 4 bits.
        base: the 4-bit base, hashed as it is read, or None.
        kept: names of the weights whose bytes are those of the 4-bit base.
        quantization: what config.json says about the 4 bits.
    """

    merged: Shards
    names: frozenset[str]
    base: Hashing | None = None
    kept: frozenset[str] = frozenset()
    quantization: object = None

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one weight."""
        if self.base is not None and name in self.kept:
            own = [n for n in self.base.about if n == name or n.startswith(f"{name}.")]
            return {n: self.base.read(n) for n in own}
        W = self.merged.read(name)
        if name not in self.names:
            return {name: W}
        if self.base is None:
            return bitsandbytes_format.write(name, double_quant.quantize(W), W.dtype)
        q, _ = bitsandbytes_format.read(name, self.base)
        return bitsandbytes_format.write(name, quantized_like(q, W), W.dtype)


def _packing(
    base: Path, adapter: Adapter, folder: Path, step: Callable[[str], None]
) -> _Packing:
    """Merge into a folder of plain weights; return how to quantize them."""
    if quantized_base.is_quantized(base):
        target = quantized_base.Target(quantized_base.DEQUANTIZED)
        quantized_base.merge(base, adapter, folder, target, step)
        raw = Hashing(Shards(base))
        names = FourBitTensors(raw).quantized
        given = (*adapter.updates, *adapter.saved)
        kept = names - {counterpart(name, raw.about) for name in given}
        said = json.loads((base / "config.json").read_text("utf-8"))
        quantization = said.get("quantization_config")
        sets = frozenset(names), raw, frozenset(kept)
        return _Packing(Shards(folder), *sets, quantization)
    merging.merge(base, adapter, folder, step=step)
    merged = Shards(folder)
    found = frozenset(name for name in merged.about if LAYER.fullmatch(name))
    if not found:
        raise InputError(
            f"{base} has no weights named layers.N.….…_proj.weight; export "
            "safetensors, and let transformers quantize them as it loads"
        )
    quantization = _quantization(merged.about[min(found)].dtype)
    return _Packing(merged, found, quantization=quantization)


def _write(folder: Path, packing: _Packing, step: Callable[[str], None]) -> None:
    merged = packing.merged
    shutil.copytree(
        merged.path, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX)
    )
    # Two passes: the header of the file comes first, and only one tensor is in memory.
    about = {}
    for name in merged.about:
        for key, tensor in packing.parts(name).items():
            about[key] = About(tensor.dtype, tuple(tensor.shape))
    path = folder / "model.safetensors"
    target = QUANTIZED if packing.base is None else quantized_base.REQUANTIZED
    with writing(path, about, {**merged.metadata, TARGET: target}) as file:
        for name in merged.about:
            for key, tensor in packing.parts(name).items():
                file.write(key, tensor)
            step(name)
        if packing.base is not None:
            before = Fingerprint.from_json(merged.metadata[BASE])  # as it was merged
            packing.base.check_unchanged(before)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = packing.quantization
    merging.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


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
