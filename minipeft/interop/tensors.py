"""Tensors in files: one safetensors file, shards, or a folder.

No pickle is read, and at most one tensor is in memory. Header, length, names and shards
of a file are checked before the first tensor is read.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import safetensors
import torch
from torch import Tensor

from minipeft.errors import InputError, cannot_write

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000
PIECE = 2**20
"""Bytes that are read at a time: they stay in the cache until they are used."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class About:
    """Dtype and shape of a tensor, known without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class Tensors(Protocol):
    """Tensors by name, from any kind of file."""

    about: Mapping[str, About]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """Return one tensor as a copy."""

    def pieces(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of one tensor; the next piece may overwrite the one before.

        Args:
            name: of the tensor.
            size: of every piece but the last, in bytes.
        """


class SafeTensors:
    """One file in the format safetensors.

    Args:
        path: of the file; its header is read and checked here.

    Raises:
        InputError: the file is absent, damaged, or has two tensors of one name.
    """

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        try:
            # The library refuses wrong offsets, lengths and overlaps.
            with safetensors.safe_open(path, framework="pt"):
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length), object_pairs_hook=unique)
        except FileNotFoundError:
            raise InputError(f"there is no file {path}; check the path") from None
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{path} is damaged or not in the format safetensors ({reason}); get "
                "the file again"
            ) from None
        # The library reads null as missing metadata.
        self.metadata: Mapping[str, str] = header.pop("__metadata__", None) or {}
        self._start = 8 + length
        self._begin = {name: entry["data_offsets"][0] for name, entry in header.items()}
        self.about: Mapping[str, About] = {
            name: About(_dtype(path, name, entry["dtype"]), tuple(entry["shape"]))
            for name, entry in header.items()
        }

    def read(self, name: str) -> Tensor:
        """Return one tensor; the file is read, not mapped, to limit the memory."""
        about = self.about[name]
        data = bytearray(about.size)
        with self.path.open("rb") as file:
            file.seek(self._start + self._begin[name])
            if file.readinto(data) != about.size:
                raise InputError(f"{self.path} ends within {name}; get the file again")
        if not data:
            return torch.empty(about.shape, dtype=about.dtype)
        return torch.frombuffer(data, dtype=about.dtype).reshape(about.shape)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, all in the same memory."""
        left = self.about[name].size
        buffer = memoryview(bytearray(min(left, size)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + self._begin[name])
            while left:
                piece = buffer[: min(left, size)]
                _fill(file, piece, f"{self.path} ends within {name}; get it again")
                left -= len(piece)
                yield piece


class Shards:
    """A folder of a model: one file `model.safetensors`, or several with an index.

    Raises:
        InputError: the folder has neither, a shard is missing or outside the folder, or
            a tensor is not in the shard that the index names.
    """

    def __init__(self, folder: str | Path, index: str = INDEX):
        self.path = folder = Path(folder)
        places = _places(folder, index)
        files = {
            file: SafeTensors(folder / file) for file in sorted({*places.values()})
        }
        for name, file in places.items():
            if name not in files[file].about:
                raise InputError(
                    f"{folder / index} says that {name} lies in {file}, but it does "
                    "not; get the folder again"
                )
        self._file = {name: files[file] for name, file in places.items()}
        self.about: Mapping[str, About] = {
            name: file.about[name] for name, file in self._file.items()
        }
        self.metadata: Mapping[str, str] = {}
        for opened in files.values():
            self.metadata = {**self.metadata, **opened.metadata}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._file[name].read(name)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, a piece at a time."""
        return self._file[name].pieces(name, size)

    def files(self) -> dict[str, list[str]]:
        """Return the names of the tensors of each file."""
        found: dict[str, list[str]] = {}
        for name, file in self._file.items():
            found.setdefault(file.path.name, []).append(name)
        return found


class Watched:
    """Tensors that say the name of each one as it is read, for progress.

    Args:
        source: of the tensors.
        step: is called with each name.
    """

    def __init__(self, source: Tensors, step: Callable[[str], None]):
        self._source, self._step = source, step
        self.about: Mapping[str, About] = source.about
        self.metadata: Mapping[str, str] = source.metadata

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        self._step(name)
        return self._source.read(name)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, a piece at a time."""
        self._step(name)
        return self._source.pieces(name, size)


def _fill(file: RawIOBase, piece: memoryview, ends: str) -> None:
    """Read a whole piece, or raise the sentence about a file that ends too early."""
    done = 0
    while done < len(piece):
        read = file.readinto(piece[done:])
        if not read:
            raise InputError(ends)
        done += read


def in_pieces(tensor: Tensor, size: int = PIECE) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in memory, as a file's are yielded."""
    data = bytes_of(tensor)
    for start in range(0, len(data), size):
        yield data[start : start + size]


def rows(tensors: Tensors, name: str, count: int) -> Iterator[Tensor]:
    """Yield a matrix, some rows at a time; the next rows may overwrite these.

    Args:
        tensors: of a file.
        name: of a matrix in it.
        count: of rows at a time.
    """
    about = tensors.about[name]
    for piece in tensors.pieces(name, count * about.shape[1] * about.dtype.itemsize):
        yield torch.frombuffer(piece, dtype=about.dtype).reshape(-1, about.shape[1])


def is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite.

    A NaN or an infinity leaves no finite sum. If the sum is not finite, the smallest
    and the largest value decide, because a sum may overflow.
    """
    plain = values.float() if values.dtype.itemsize == 1 else values
    if not plain.numel() or bool(plain.sum().isfinite()):
        return True
    return bool(torch.stack(plain.aminmax()).isfinite().all())


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in C order, without a copy where it lies so."""
    plain = tensor.detach().cpu().contiguous()
    # One value may keep a step of any size, which torch cannot view as bytes.
    plain = plain.as_strided((plain.numel(),), (1,))
    data: memoryview = plain.view(torch.uint8).numpy().data
    return data


def open_tensors(path: str | Path) -> Tensors:
    """Return the tensors of a file or of a model's folder.

    Raises:
        InputError: the file is absent, unknown or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return Shards(path)
    if not path.exists():
        raise InputError(f"there is no file or folder {path}; check the path")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise InputError(
            f"{path} is a pickle, which can run any program when it is opened; convert "
            "it to safetensors where it was made"
        )
    return SafeTensors(path)


def _places(folder: Path, index: str) -> dict[str, str]:
    """Return {tensor: file} of a folder."""
    one = index.removesuffix(".index.json")
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give a model's folder")
    if not any((folder / name).exists() for name in (index, one)):
        raise InputError(
            f"{folder} holds neither {one} nor {index}; give a model's folder, in "
            "safetensors"
        )
    if not (folder / index).exists():
        single = SafeTensors(folder / index.removesuffix(".index.json"))
        return dict.fromkeys(single.about, single.path.name)
    try:
        text = (folder / index).read_text("utf-8")
        places = json.loads(text, object_pairs_hook=unique)["weight_map"]
        odd = [
            f for f in places.values() if Path(f).name != f or not isinstance(f, str)
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / index} is damaged ({type(error).__name__}: {error}); get the "
            "folder again"
        ) from None
    if odd:
        raise InputError(
            f"{folder / index} points to {odd[0]!r}, which lies outside its folder; do "
            "not use this model"
        )
    _check_one_model(folder, index, places)
    return dict(places)


def _check_one_model(folder: Path, index: str, places: Mapping[str, str]) -> None:
    one = index.removesuffix(".index.json")
    if (folder / one).exists() and one not in places.values():
        raise InputError(
            f"{folder} holds two models, {one} and the files of {index}; delete the "
            "one that is out of date"
        )


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; for `object_pairs_hook`.

    Raises:
        ValueError: a key appears twice; programs differ in which value they use.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {double!r} stands twice")
    return found


def _dtype(path: Path, name: str, dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise InputError(
            f"{name} in {path} has the dtype {dtype}, which is not supported; the "
            f"dtypes are {', '.join(DTYPES)}"
        )
    return DTYPES[dtype]


class Writer:
    """Writes the announced tensors of one file, in any order, several at a time.

    Args:
        file: with its header.
        about: dtype and shape of each tensor, in the order of the file.
    """

    def __init__(self, file: BinaryIO, about: Mapping[str, About]):
        file.flush()
        self._file, self._left, self._begin = file, dict(about), {}
        begin = file.tell()
        for name, one in about.items():
            self._begin[name] = begin
            begin += one.size

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its form must be the announced one."""
        about = About(tensor.dtype, tuple(tensor.shape))
        self._put(name, about, [bytes_of(tensor)])

    def copy(self, name: str, source: Tensors) -> None:
        """Write one tensor of another file with unchanged bytes."""
        self._put(name, source.about[name], source.pieces(name))

    def write_pieces(self, name: str, about: About, pieces: Iterable[Tensor]) -> None:
        """Write one tensor, a piece at a time; together they are of the form."""
        self._put(name, about, map(bytes_of, pieces))

    def _put(self, name: str, about: About, pieces: Iterable[memoryview]) -> None:
        announced = self._left.pop(name, None)
        if about != announced:
            raise ValueError(f"{name} is {about}, and {announced} was announced")
        place = begin = self._begin[name]
        for piece in pieces:
            while piece.nbytes:  # Linux writes at most 2 GiB at a time
                done = os.pwrite(self._file.fileno(), piece, place)
                piece, place = piece[done:], place + done
        if place - begin != about.size:
            raise ValueError(f"{name} has {place - begin} bytes, not {about.size}")

    def finish(self) -> None:
        """Check that all tensors were written, and flush the file to the disk."""
        if self._left:
            raise ValueError(f"{next(iter(self._left))} was announced and not written")
        os.fsync(self._file.fileno())


@contextmanager
def writing(
    path: str | Path, about: Mapping[str, About], metadata: Mapping[str, str]
) -> Iterator[Writer]:
    """Write a safetensors file tensor by tensor; it appears whole, or not at all.

    Args:
        path: of the file; an existing file is replaced at the end.
        about: dtype and shape of each tensor, in the order of the file.
        metadata: text by name, kept in the header.

    Raises:
        InputError: the folder cannot be written or the disk is full.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}."
        )
        with os.fdopen(descriptor, "wb") as file:
            file.write(_header(about, metadata))
            writer = Writer(file, about)
            yield writer
            writer.finish()
            os.fchmod(file.fileno(), _mode(path))
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Write the metadata of a file again, in the place of others of the same length.

    Args:
        path: of a file that is not in use yet: a crash here damages it.
        metadata: text by name.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        text = _text({**header, "__metadata__": dict(metadata)})
        if len(text) != length:
            raise ValueError(f"the header has {len(text)} bytes now, not {length}")
        file.seek(8)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _header(about: Mapping[str, About], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, one in about.items():
        header[name] = {
            "dtype": NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [begin, begin + one.size],
        }
        begin += one.size
    text = _text(header)
    if len(text) > LARGEST_HEADER:
        raise InputError("the header has more than 100 MB; write several files")
    return len(text).to_bytes(8, "little") + text


def _text(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes


def _mode(path: Path) -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask
