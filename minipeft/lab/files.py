"""Write files completely or not at all: to a temporary name, then a rename."""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minipeft.errors import InputError

LARGEST_RECORD = 2**16


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`; on any failure the old file stays.

    A symbolic link stays; its target is written. The new file has the permissions of
    the old one, or those of the umask.

    Raises:
        InputError: The folder cannot be written or the disk is full, or the path is a
            folder or a device, which a rename would replace.
    """
    temporary = None
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise InputError(f"{path} is no regular file; choose another path")
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}."
        )
        with os.fdopen(descriptor, "wb") as file:
            _write(file.fileno(), data)
            os.fchmod(file.fileno(), _mode(target))
            os.fsync(file.fileno())  # the data must be on the disk before the rename
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {path}: {reason}; free some space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def check_folder(path: Path, option: str) -> None:
    """Refuse a place where a folder cannot be, before a run that would write to it.

    Args:
        path: of a folder, which need not be there.
        option: that named it.

    Raises:
        InputError: a file stands in the way, or the folder cannot be written.
    """
    there = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not there.is_dir():
        raise InputError(f"{option} is {path}, and {there} is a file; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{option} is {path}, and {there} cannot be written; choose another"
        )


def read_record(path: Path, kinds: dict[str, type]) -> dict[str, Any] | None:
    """Return what a run wrote beside its checkpoints; None: nothing is there.

    Args:
        path: of a file of JSON.
        kinds: the type of each of its fields, all of them; a number is at least 1.

    Raises:
        InputError: no run wrote what is there, so that no run may replace it.
    """
    if not os.path.lexists(path):
        return None
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("it is a link or no regular file")
        with path.open("rb") as file:
            found = json.loads(file.read(LARGEST_RECORD))
        if not isinstance(found, dict) or found.keys() != kinds.keys():
            raise ValueError(f"its fields are not {', '.join(kinds)}")
        for key, kind in kinds.items():
            if type(found[key]) is not kind or (kind is int and found[key] < 1):
                raise ValueError(f"{key} is {found[key]!r:.40}")
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} is not what a run wrote ({why}); move it to another folder or "
            "remove it: the next run, resumed or not, writes it anew"
        ) from None
    return found


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Lock a file against other processes that call this function.

    Raises:
        InputError: Another process has claimed the file; its lock cannot be taken.
    """
    # The lock is in another folder, so that no file is left beside this one.
    key = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir(), f"minipeft-{key}.lock")
    lock = FileLock(place, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another process writes {path}; wait for it, or choose another path"
        ) from None
    except OSError as error:
        raise InputError(
            f"{place} cannot be locked ({error.strerror}); remove it, or let TMPDIR "
            "name a folder of your own on a local disk"
        ) from error
    try:
        yield
    finally:
        lock.release()


@functools.cache
def claim(path: Path) -> contextlib.ExitStack:
    """Lock a file or a folder against other processes until this one ends.

    Raises:
        InputError: Another process has claimed it.
    """
    held = contextlib.ExitStack()
    held.enter_context(claimed(path))
    return held


def _mode(path: Path) -> int:
    """Return the permissions that a plain `open` would leave the file with."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mode & 0o777
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


def _sync_folder(folder: Path) -> None:
    # Write the new name to the disk as well; some file systems refuse.
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    """Write all of `data`; the only place where a full disk raises an error."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
