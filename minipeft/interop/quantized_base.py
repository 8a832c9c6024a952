"""Merge an adapter into a 4-bit base. There are three targets, and the file names one.

original: the weights before they were quantized. dequantized: what the 4 bits decode
to, kept in floats. requantized: the same, rounded to 4 bits once more.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minipeft.errors import InputError
from minipeft.interop import fingerprint, made, merging
from minipeft.interop.adapter import Adapter
from minipeft.interop.bitsandbytes_format import STATE, FourBitTensors
from minipeft.interop.fingerprint import BASE, Fingerprint, Hashing
from minipeft.interop.made import TARGET
from minipeft.interop.merging import Source, Step
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import Shards, Tensors

ORIGINAL, DEQUANTIZED, REQUANTIZED = "original", "dequantized", "requantized"
TARGETS = (ORIGINAL, DEQUANTIZED, REQUANTIZED)


@dataclass(frozen=True)
class Target:
    """What to merge into.

    Args:
        name: one of `TARGETS`.
        original: the folder of the model before it was quantized, for that target.
        dtype: of floating tensors, and in config.json; None keeps each as it is.
    """

    name: str
    original: Path | None = None
    dtype: torch.dtype | None = None


def is_quantized(folder: str | Path) -> bool:
    """Return whether a folder holds weights in the 4 bits of bitsandbytes.

    Raises:
        InputError: it holds no model.
    """
    return any(STATE in name for name in Shards(folder).about)


def merge(
    base: str | Path,
    adapter: Adapter,
    out: str | Path,
    target: Target,
    step: Step = lambda name: None,
) -> str:
    """Write the merged model as a folder; return a line about the base.

    Args:
        base: the folder of the 4-bit model that the adapter was trained on.
        adapter: what to merge.
        out: the new folder; it must not exist.
        target: what to merge into.
        step: is called with the name of each tensor, for progress.

    Raises:
        InputError: as `merging.merge`; the original is not the model that was
            quantized; or the target is not known.
    """
    merging.check_new(out)
    if target.name == REQUANTIZED:
        from minipeft.interop import bitsandbytes_export

        bitsandbytes_export.write_model(base, adapter, out, step)
        return made.about_base(adapter.metadata)
    if target.name == DEQUANTIZED:
        return merging.write(
            opened(base, adapter), adapter, Path(out), target.dtype, step
        )
    if target.name != ORIGINAL or target.original is None:
        raise InputError(
            f"the base holds 4-bit weights, and the target is {target.name!r}; choose "
            f"{DEQUANTIZED}, {REQUANTIZED}, or {ORIGINAL} with the original's folder"
        )
    return _into_original(base, adapter, Path(out), target, step)


def opened(base: str | Path, adapter: Adapter) -> Source:
    """Return a 4-bit base as a source of decoded weights, compared with the adapter's.

    Raises:
        InputError: the adapter was made for another base.
    """
    shards = Shards(base)
    saved = _decoded_fingerprint(adapter)
    if saved:
        fingerprint.check(saved, fingerprint.of_files(FourBitTensors(shards)))
        read = Hashing(shards)
    else:
        read = merging.compared(adapter, shards)
    tensors = FourBitTensors(read)
    files = {
        file: [name for name in names if name in tensors.about]
        for file, names in shards.files().items()
    }
    facts = {TARGET: DEQUANTIZED}
    return Source(Path(base), read, tensors, files, facts)


def _decoded_fingerprint(adapter: Adapter) -> Fingerprint | None:
    """Return the fingerprint of the adapter's base, if it is one of decoded weights."""
    if BASE not in adapter.metadata:
        return None
    saved = Fingerprint.from_json(adapter.metadata[BASE])
    return None if any(STATE in name for name in saved.tensors) else saved


def _into_original(
    base: str | Path, adapter: Adapter, out: Path, target: Target, step: Step
) -> str:
    opened(base, adapter).read.fingerprint()  # which compares every tensor
    assert target.original is not None
    shards = Shards(target.original)
    check_original(shards, FourBitTensors(Shards(base)))
    read = Hashing(shards)
    facts = {TARGET: ORIGINAL}
    source = Source(Path(target.original), read, read, shards.files(), facts)
    free = {key: text for key, text in adapter.metadata.items() if key != BASE}
    merging.write(source, replace(adapter, metadata=free), out, target.dtype, step)
    return made.about_base(adapter.metadata)


def check_original(original: Tensors, quantized: FourBitTensors) -> None:
    """Refuse a model that does not become the 4-bit one when it is quantized.

    Raises:
        InputError: a tensor is missing, or is rounded to others.
    """
    for name, about in quantized.about.items():
        place = counterpart(name, original.about)
        if place is None or original.about[place].shape != about.shape:
            raise InputError(
                f"{name} of the 4-bit base is not in the original, or has another "
                "shape there; give the model that was quantized"
            )
        W, found = original.read(place), quantized.read(name)
        if name in quantized.quantized:
            rounding = quantized.rounding(name)
            right = rounding.reachable(found, W, torch.zeros_like(W))
        else:
            right = torch.equal(W.to(found.dtype), found)
        if not right:
            raise InputError(
                f"{name} of the original is not rounded to that of the 4-bit base; "
                "give the model that was quantized"
            )
