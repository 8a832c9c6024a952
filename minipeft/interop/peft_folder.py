"""The two files of an adapter's folder: a configuration and tensors.

Only safetensors and JSON are read and written. A folder is checked completely before it
is used. A written folder appears complete, or not at all.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from minipeft.errors import InputError, cannot_write
from minipeft.interop.tensors import About, SafeTensors, in_pieces, unique, writing

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERHUB = "adapter.safetensors"
"""The file of tensors of AdapterHub's library."""
PREFIX = "base_model.model."
SUM = "minipeft.sha256"
"""The key of the metadata with the checksum of tensors and minipeft's metadata."""
LARGEST_CONFIG = 2**24
LARGEST_WEIGHTS = 2**36
"""The largest size of the two files in bytes; a larger file is no adapter."""


@dataclass(frozen=True)
class Contents:
    """The contents of the two files.

    Args:
        config: of `adapter_config.json`.
        tensors: by their names in the file.
        metadata: text by name, of the header.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read(folder: str | Path, weights: str = WEIGHTS) -> Contents:
    """Return the contents of an adapter's folder.

    Args:
        folder: of the adapter.
        weights: the name of its file of tensors.

    Raises:
        InputError: a file is absent, damaged, too large to be one of an adapter, or a
            pickle, a number in it is not finite, or its checksum is another one.
    """
    config = read_config(folder)
    path = check_holds(folder, weights)
    file = SafeTensors(path)
    check_sum(file)
    tensors = {name: file.read(name) for name in file.about}
    if not tensors:
        raise InputError(f"{path} holds no tensor; get the file again")
    for name, tensor in tensors.items():
        check_finite(f"{name} in {path}", tensor)
    return Contents(config, tensors, file.metadata)


def check_sum(file: SafeTensors) -> None:
    """Refuse a file that is not as it was written; one of peft has no checksum.

    A note that somebody else added to the metadata is not covered.

    Raises:
        InputError: a checksum is there, and it is another one.
    """
    named = ((name, file.about[name], file.pieces(name)) for name in sorted(file.about))
    if SUM in file.metadata and file.metadata[SUM] != _sum(named, file.metadata):
        raise InputError(
            f"{file.path} is damaged, or was changed since minipeft wrote it: its "
            "checksum is another one; get the file again, or, if the change was meant, "
            f"remove the key {SUM} from its metadata, or change and save the adapter "
            "with minipeft"
        )


def _sum(
    named: Iterable[tuple[str, About, Iterable[memoryview]]],
    metadata: Mapping[str, str],
) -> str:
    """Return the SHA-256 of tensors, by the order of names, and of our metadata."""
    own = {key for key in metadata if key.startswith("minipeft.")} - {SUM}
    facts = {key: metadata[key] for key in own | ({"format"} & metadata.keys())}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, about, pieces in named:
        digest.update(f"\n{name} {about.dtype} {[*about.shape]}\n".encode())
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()


def check_holds(folder: str | Path, weights: str = WEIGHTS) -> Path:
    """Return the path of a folder's file of tensors, which is not opened yet.

    Raises:
        InputError: the file is absent or too large, a pickle or a file of AdapterHub
            stands in its place, or `folder` is a file.
    """
    folder = Path(folder)
    path = folder / weights
    for pickle in ("adapter_model.bin", "pytorch_adapter.bin"):
        if not path.exists() and (folder / pickle).exists():
            raise InputError(
                f"{folder} holds {pickle}, a pickle, which can run any program when it "
                "is opened; convert it to safetensors where it was made"
            )
    if not path.exists() and (folder / ADAPTERHUB).exists():
        raise InputError(
            f"{folder} holds {ADAPTERHUB}, a bottleneck adapter of AdapterHub, which "
            "changes no weight; put it onto its model with "
            "minipeft.interop.adapterhub_format.load"
        )
    _check_size(path, LARGEST_WEIGHTS)
    return path


def read_config(folder: str | Path, name: str = CONFIG) -> dict[str, Any]:
    """Return the configuration of an adapter, or another JSON object of a folder.

    Raises:
        InputError: it is absent, no JSON, no object, has a key twice, or a number in it
            is not finite.
    """
    path = Path(folder) / name
    _check_size(path, LARGEST_CONFIG)
    try:
        text = path.read_text("utf-8")
        config = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); get the folder again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} is no JSON object; get the folder again")
    return config


def write(folder: str | Path, contents: Contents, weights: str = WEIGHTS) -> None:
    """Write an adapter's folder; it appears whole, or not at all.

    Args:
        folder: a new one.
        contents: of its two files.
        weights: the name of the file of tensors.

    Raises:
        InputError: the folder exists, a tensor is not finite, or the disk is full.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists; choose another folder, or remove it")
    for name, tensor in contents.tensors.items():
        check_finite(name, tensor)
    text = _text(contents.config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        _write_tensors(part / weights, contents)
        (part / CONFIG).write_text(text + "\n", "utf-8")
        part.chmod(0o755)
        part.rename(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _text(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(config), indent=2, sort_keys=True, allow_nan=False)
    except ValueError:
        odd = {n: v for n, v in config.items() if isinstance(v, float)}
        odd = {n: v for n, v in odd.items() if not math.isfinite(v)}
        raise InputError(
            f"the configuration holds {odd or 'a number that is not finite'}, which "
            "JSON cannot hold; give finite numbers"
        ) from None


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinities.

    Raises:
        InputError: the tensor holds NaN or an infinity.
    """
    plain = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if plain.is_floating_point() and not bool(plain.isfinite().all()):
        raise InputError(f"{name} is not finite; train it again")


def _write_tensors(path: Path, contents: Contents) -> None:
    names = sorted(contents.tensors)
    tensors = {n: contents.tensors[n].detach() for n in names}
    about = {n: About(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    metadata = {"format": "pt", **contents.metadata}
    named = ((n, about[n], in_pieces(tensors[n])) for n in names)
    with writing(path, about, {**metadata, SUM: _sum(named, metadata)}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def _check_size(path: Path, most: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"there is no {path}; give the folder of an adapter") from None
    except NotADirectoryError:
        raise InputError(
            f"{path.parent} is a file; give the folder of an adapter, not a file in it"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); check the path") from None
    if not path.is_file():
        raise InputError(f"{path} is no file; give the folder of an adapter")
    if size > most:
        raise InputError(
            f"{path} has {size} bytes, and no adapter has more than {most}; give the "
            "folder of an adapter"
        )


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_constant(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"it holds the number {text}, which is not finite")
