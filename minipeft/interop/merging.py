"""Merge an adapter into a base: file by file, some tensors at a time."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import InputError, cannot_write
from minipeft.interop import fingerprint, made, tying
from minipeft.interop.adapter import Adapter
from minipeft.interop.apart import named_as
from minipeft.interop.fingerprint import BASE, THREADS, Fingerprint, Hashing
from minipeft.interop.tensors import (
    INDEX,
    About,
    Shards,
    Tensors,
    Writer,
    is_finite,
    replace_metadata,
    writing,
)
from minipeft.interop.update import ROWS, in_rows, merged, merged_rows, one_thread

Step = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A base to merge into.

    Args:
        folder: with its configuration and its tokenizer.
        read: its files, hashed as they are read.
        tensors: the same, or what is decoded from them.
        files: the names of the tensors in each file of the merged model.
        facts: what the metadata of these files says besides.
    """

    folder: Path
    read: Hashing
    tensors: Tensors
    files: Mapping[str, list[str]]
    facts: Mapping[str, str] = field(default_factory=dict)


def merge(
    base: str | Path,
    adapter: Adapter,
    out: str | Path,
    dtype: torch.dtype | None = None,
    step: Step = lambda name: None,
) -> str:
    """Write the merged model as a folder that transformers loads.

    Every changed weight is computed in float32 and rounded once; every other tensor is
    copied. The base is compared with the adapter's in the same pass. The folder appears
    whole, or not at all. Returns a line about the base.

    Args:
        base: a model's folder.
        adapter: what to merge; without the fingerprint in its metadata, any base goes.
        out: the new folder; it must not exist.
        dtype: of floating tensors, and in config.json; None keeps each as it is.
        step: is called with the name of each tensor, for progress; by several threads.

    Raises:
        InputError: the folder exists, the adapter does not fit the base or was made for
            another, or the disk is full.
    """
    check_new(out)
    shards = Shards(base)
    read = compared(adapter, shards)
    source = Source(Path(base), read, read, shards.files())
    return write(source, adapter, Path(out), dtype, step)


def write(
    source: Source, adapter: Adapter, out: Path, dtype: torch.dtype | None, step: Step
) -> str:
    """Write the merged model into a new folder; return a line about the base.

    Args:
        source: the base.
        adapter: what to merge.
        out: the new folder.
        dtype: of floating tensors, and in config.json; None keeps each as it is.
        step: is called with the name of each tensor, for progress; by several threads.

    Raises:
        InputError: as `merge`.
    """
    ties = tying.ties(source.folder)
    base, adapter = tying.pulled_apart(source.tensors, adapter, ties)
    adapter = adapter.renamed(base.about)
    adapter.check_tables(base)
    merger = Merger(base, adapter, dtype, step)
    folder = beside(out)
    try:
        places = _files(source.files, base, adapter)
        facts = made.origin(adapter, source.read.unknown(), source.facts)
        for file, names in places.items():
            merger.write(folder / file, names, facts)
        facts = made.origin(adapter, source.read.fingerprint(), source.facts)
        for file in places:
            replace_metadata(folder / file, {"format": "pt", **facts})
        if len(places) > 1:
            size = sum(merger.about(n).size for names in places.values() for n in names)
            _write_index(folder, places, size)
        _copy_others(source.folder, folder)
        _mend(folder / "config.json", dtype, isinstance(base, tying.Untied))
        folder.chmod(0o755)
        folder.rename(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return made.about_base(adapter.metadata)


def check_new(out: str | Path) -> None:
    """Refuse a place that is taken.

    Raises:
        InputError: there is a file or a folder.
    """
    if Path(out).exists():
        raise InputError(f"{out} exists; choose another folder, or remove it")


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


def compared(adapter: Adapter, base: Tensors) -> Hashing:
    """Return the base's tensors, compared with the adapter's base as they are read.

    Stacks of experts that lie apart are not read whole, so they are compared here.

    Raises:
        InputError: the adapter was made for another base, as far as the names tell; the
            rest is found when a tensor is read.
    """
    if BASE not in adapter.metadata:
        return Hashing(base)
    saved = Fingerprint.from_json(adapter.metadata[BASE])
    whole = named_as(saved.tensors, base)
    if whole is base:
        return Hashing(base, saved, adapter.saved)
    check_base(adapter, fingerprint.of_files(whole))
    return Hashing(base)


def check_base(adapter: Adapter, base: Fingerprint) -> str:
    """Refuse a base that is not the adapter's; return a line about the base.

    Raises:
        InputError: the adapter was made for another base.
    """
    if BASE in adapter.metadata:
        saved = Fingerprint.from_json(adapter.metadata[BASE])
        fingerprint.check(saved, base, adapter.saved)
    return made.about_base(adapter.metadata)


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


class Merger:
    """Writes the merged tensors of a model, some at a time.

    Args:
        base: that the adapter changes.
        adapter: by the names of the base.
        dtype: of floating tensors; None keeps each as it is.
        step: is called with the name of each tensor.
    """

    def __init__(
        self, base: Tensors, adapter: Adapter, dtype: torch.dtype | None, step: Step
    ):
        self._base, self._adapter, self._dtype = base, adapter, dtype
        self._step, self._whole = step, Lock()

    def write(self, path: Path, names: list[str], facts: Mapping[str, str]) -> None:
        """Write one file.

        Args:
            path: of the file.
            names: of its tensors.
            facts: about its origin, for its metadata.
        """
        about = {name: self.about(name) for name in names}
        # The kernel, SHA-256 and torch leave Python's lock, so that threads help.
        threads = min(THREADS, os.cpu_count() or 1)
        with (
            one_thread(),
            writing(path, about, {"format": "pt", **facts}) as file,
            ThreadPoolExecutor(threads) as pool,
        ):
            for _ in pool.map(lambda name: self._one(file, name, about[name]), names):
                pass

    def about(self, name: str) -> About:
        """Return dtype and shape of a merged tensor."""
        own, saved = self._base.about.get(name), self._adapter.saved.get(name)
        if saved is not None:
            kept = own.dtype if own else saved.dtype
            return About(self._dtype or kept, tuple(saved.shape))
        own = self._base.about[name]
        if self._dtype is None or not own.dtype.is_floating_point:
            return own
        return About(self._dtype, own.shape)

    def _one(self, file: Writer, name: str, about: About) -> None:
        base, adapter = self._base, self._adapter
        changed = name in adapter.updates or name in adapter.biases
        if name in adapter.saved:
            file.write(name, cast(name, adapter.saved[name], about.dtype))
        elif not changed and about == base.about[name]:
            file.copy(name, base)
        elif not changed:
            file.write_pieces(name, about, self._cast(name, about.dtype))
        elif self.streams(name):
            file.write_pieces(name, about, self.rows(name, about.dtype))
        else:
            with self._whole:  # so that one such tensor is in memory at a time
                file.write(name, self._changed(name, about.dtype))
        self._step(name)

    def _cast(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        for piece in self._base.pieces(name):
            W = torch.frombuffer(piece, dtype=self._base.about[name].dtype)
            yield cast(name, W, dtype)

    def streams(self, name: str) -> bool:
        """Return whether a weight can be merged some of its rows at a time."""
        updates = self._adapter.updates
        return name in updates and in_rows(updates[name], self._base.about[name])

    def rows(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the merged rows, rounded; the next ones overwrite them."""
        update = self._adapter.updates[name]
        rounded = torch.empty(min(ROWS, len(update.B)), update.A.shape[1], dtype=dtype)
        for V in merged_rows(self._base, name, update):
            piece = rounded[: len(V)].copy_(V)
            check_merged(name, piece)
            yield piece

    def _changed(self, name: str, dtype: torch.dtype) -> Tensor:
        W, adapter = self._base.read(name), self._adapter
        # The wider of the two dtypes, so that the sum is rounded once.
        W = W.to(torch.promote_types(W.dtype, dtype))
        if name in adapter.updates:
            W = merged(W, adapter.updates[name])
        else:
            W = (W.float() + adapter.biases[name].float()).to(W.dtype)
        W = W.to(dtype)
        check_merged(name, W)
        return W


def cast(name: str, W: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another dtype; what is not finite already stays so.

    Raises:
        InputError: a finite value is beyond the dtype.
    """
    rounded = W.to(dtype)
    if not is_finite(rounded) and bool(
        (W.double().isfinite() & ~rounded.isfinite()).any()
    ):
        raise InputError(
            f"{name} has a value beyond {str(dtype).removeprefix('torch.')}; choose a "
            "wider --dtype, or --kind"
        )
    return rounded


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


def _files(
    files: Mapping[str, list[str]], base: Tensors, adapter: Adapter
) -> dict[str, list[str]]:
    """Return the tensors of each file; new tensors go to the last file."""
    places = {file: [*names] for file, names in files.items()}
    known = {name for names in files.values() for name in names}
    places[max(places)] += [
        n for n in {**base.about, **adapter.saved} if n not in known
    ]
    return places


def _write_index(folder: Path, places: Mapping[str, list[str]], size: int) -> None:
    weights = {name: file for file, names in places.items() for name in names}
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(weights.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _mend(path: Path, dtype: torch.dtype | None, untied: bool) -> None:
    """Write dtype and a head of its own into a configuration, for transformers."""
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
    before = json.dumps(config)
    config.pop("quantization_config", None)  # every weight is a plain one now
    if untied:
        tying.untie(config)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if not _replace_dtype(config, name):
            config["dtype"] = name
    if json.dumps(config) != before:
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
