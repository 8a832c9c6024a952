"""Files that are whole or absent: written to a temporary name, then renamed."""

import contextlib
import os
import tempfile
from pathlib import Path

from minipeft.errors import InputError


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path`; on any failure leave what was there before.

    Raises:
        InputError: The folder cannot be written or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}."
        )
        with os.fdopen(descriptor, "wb") as file:
            _write(file.fileno(), data)
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide the result
            os.fsync(file.fileno())  # the rename must not outrun the data
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write {path}: {reason}; free some space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _write(descriptor: int, data: bytes) -> None:
    """Write all of `data`: the one place that a full disk stops."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
