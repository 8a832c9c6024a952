"""Merge an adapter into a base: file by file, tensor by tensor."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from minipeft.errors import InputError, cannot_write
from minipeft.interop import fingerprint
from minipeft.interop.adapter import Adapter
from minipeft.interop.fingerprint import Fingerprint
from minipeft.interop.tensors import INDEX, About, Shards, Writer, is_finite, writing
from minipeft.interop.update import (
    ROWS,
    Update,
    in_rows,
    merged,
    merged_rows,
    one_thread,
)

BASE = "minipeft.base"
"""The key of a file's metadata with the fingerprint of its base."""


def merge(
    base: str | Path,
    adapter: Adapter,
    out: str | Path,
    dtype: torch.dtype | None = None,
    step: Callable[[str], None] = lambda name: None,
) -> None:
    """Write the merged model as a folder that transformers loads.

    Every changed weight is computed in float32 and rounded once; every other tensor is
    copied. The folder appears whole, or not at all.

    Args:
        base: a model's folder.
        adapter: what to merge.
        out: the new folder; it must not exist.
        dtype: of floating tensors, and in config.json; None keeps each as it is.
        step: is called with the name of each tensor, for progress.

    Raises:
        InputError: the folder exists, the adapter does not fit the base, or the disk is
            full.
    """
    base, out = Path(base), Path(out)
    if out.exists():
        raise InputError(f"{out} exists; choose another folder, or remove it")
    source = Shards(base)
    adapter = adapter.renamed(source.about)
    folder = beside(out)
    try:
        places = _files(source, adapter)
        for file, names in places.items():
            about = {n: _about(n, source, adapter, dtype) for n in names}
            _write(folder / file, source, adapter, about, step)
        if len(places) > 1:
            _write_index(folder, places, source)
        _copy_others(base, folder)
        if dtype is not None:
            _say_dtype(folder / "config.json", dtype)
        folder.chmod(0o755)
        folder.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def beside(out: Path) -> Path:
    """Make an empty folder beside a new one, to be renamed when it is whole.

    Raises:
        InputError: it cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise cannot_write(out, error) from error


def check_base(adapter: Adapter, base: Fingerprint) -> str:
    """Refuse a base that is not the adapter's; return a line about the base.

    Raises:
        InputError: the adapter was made for another base.
    """
    if BASE not in adapter.metadata:
        return "the adapter does not say which base it was made for"
    saved = Fingerprint.from_json(adapter.metadata[BASE])
    fingerprint.check(saved, base, adapter.saved)
    return f"the base is the one that the adapter was made for ({saved.whole[:12]})"


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole, or not at all.

    Raises:
        InputError: the folder cannot be written or the disk is full.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error


def _files(source: Shards, adapter: Adapter) -> dict[str, list[str]]:
    """Return the tensors of each file; new tensors go to the last file."""
    places = source.files()
    new = [name for name in adapter.saved if name not in source.about]
    places[max(places)] += new
    return places


def _write(
    path: Path,
    source: Shards,
    adapter: Adapter,
    about: Mapping[str, About],
    step: Callable[[str], None],
) -> None:
    with one_thread(), writing(path, about, {"format": "pt"}) as writer:
        for name in about:
            _write_one(writer, name, source, adapter, about[name])
            step(name)


def _about(
    name: str, source: Shards, adapter: Adapter, dtype: torch.dtype | None
) -> About:
    if name in adapter.saved:
        kept = source.about[name].dtype if name in source.about else None
        tensor = adapter.saved[name]
        return About(dtype or kept or tensor.dtype, tuple(tensor.shape))
    about = source.about[name]
    if dtype is None or not about.dtype.is_floating_point:
        return about
    return About(dtype, about.shape)


def _write_one(
    writer: Writer, name: str, source: Shards, adapter: Adapter, about: About
) -> None:
    changed = name in adapter.updates or name in adapter.biases
    if name in adapter.saved:
        writer.write(name, adapter.saved[name].to(about.dtype))
    elif not changed and about == source.about[name]:
        writer.copy(name, source)
    elif changed and _streams(name, adapter, about):
        merge = _rows(name, source, adapter.updates[name], about.dtype)
        writer.write_pieces(name, about, merge)
    else:
        W = source.read(name)
        # The wider of the two dtypes, so that the sum is rounded once.
        W = W.to(torch.promote_types(W.dtype, about.dtype))
        if name in adapter.updates:
            W = merged(W, adapter.updates[name])
        elif name in adapter.biases:
            W = (W.float() + adapter.biases[name].float()).to(W.dtype)
        W = W.to(about.dtype)
        if changed:
            check_merged(name, W)
        writer.write(name, W)


def check_merged(name: str, W: torch.Tensor) -> None:
    """Refuse a merged weight with NaN or infinities.

    Raises:
        InputError: the sum is beyond the dtype, or the base is not finite.
    """
    if not is_finite(W):
        raise InputError(
            f"{name} merged is not finite in {str(W.dtype).removeprefix('torch.')}; "
            "choose a wider --dtype, or look for a huge lora_alpha or NaN in the base"
        )


def _streams(name: str, adapter: Adapter, about: About) -> bool:
    """Return whether a weight can be merged some of its rows at a time."""
    return name in adapter.updates and in_rows(adapter.updates[name], about)


def _rows(
    name: str, source: Shards, update: Update, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Yield the merged rows, rounded; the next ones overwrite them."""
    rounded = torch.empty(min(ROWS, len(update.B)), update.A.shape[1], dtype=dtype)
    for V in merged_rows(source, name, update):
        piece = rounded[: len(V)].copy_(V)
        check_merged(name, piece)
        yield piece


def _write_index(folder: Path, places: Mapping[str, list[str]], source: Shards) -> None:
    weights = {name: file for file, names in places.items() for name in names}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(weights.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _say_dtype(path: Path, dtype: torch.dtype) -> None:
    """Write the dtype into a configuration, as the dtype that transformers loads."""
    if not path.exists():
        return
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(
            f"config.json of the base is damaged ({error}); get the folder again"
        ) from None
    if not isinstance(config, dict):
        raise InputError("config.json of the base is no JSON object; get it again")
    name = str(dtype).removeprefix("torch.")
    if not _replace_dtype(config, name):
        config["dtype"] = name
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _replace_dtype(config: dict[str, Any], name: str) -> bool:
    """Replace the dtypes of a model and its parts; say whether the model had one."""
    held = [key for key in ("dtype", "torch_dtype") if key in config]
    config.update(dict.fromkeys(held, name))
    for part in config.values():
        if isinstance(part, dict):
            _replace_dtype(part, name)
    return bool(held)


def _copy_others(base: Path, folder: Path) -> None:
    """Copy configuration and tokenizer, but no weights in other formats."""
    for path in sorted(base.iterdir()):
        kept = path.suffix in (".json", ".txt", ".model", ".jinja", ".md")
        if path.is_file() and kept and path.name != INDEX:
            shutil.copyfile(path, folder / path.name)
