"""What the runs in a folder of checkpoints learn from: a resumed run has the same."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from minipeft.errors import InputError
from minipeft.lab.files import read_record, write_atomic
from minipeft.lab.task import Task

KEPT = "run-data.json"
KINDS = {"name": str, "examples": int, "sha256": str}


def keep_source(folder: Path | None, name: str, task: Task) -> None:
    """Write what runs learn from beside their checkpoints; never replace other data.

    Args:
        folder: of the checkpoints; None: nothing is written.
        name: of the data, for a person.
        task: with all examples, as the data hold them.

    Raises:
        InputError: as `checked_source`.
    """
    now = checked_source(folder, name, task)
    if folder is not None:
        write_atomic(folder / KEPT, (json.dumps(now) + "\n").encode())


def checked_source(folder: Path | None, name: str, task: Task) -> Mapping[str, object]:
    """Return the record of what runs learn from; the one in the folder must agree.

    A run that is under way may have saved nothing yet, so it is the record that counts.

    Args:
        folder: of the checkpoints; None: there is no record.
        name: of the data, for a person.
        task: with all examples, as the data hold them.

    Raises:
        InputError: the runs in the folder learn from other examples; a file of that
            name was not written by a run.
    """
    sides = json.dumps([task.train, task.validation]).encode()
    count = len(task.train) + len(task.validation)
    digest = hashlib.sha256(sides).hexdigest()
    now = {"name": name, "examples": count, "sha256": digest}
    if folder is None:
        return now
    path = folder / KEPT
    before = read_record(path, KINDS)
    if before and before["sha256"] != digest:
        raise InputError(
            f"{folder} is for runs on {_said(before)}, and this one is on "
            f"{_said(now)}; give the data of those runs, or another folder; if none of "
            f"them is left or under way, remove {path}"
        )
    return now


def _said(source: Mapping[str, object]) -> str:
    digest = str(source["sha256"])[:8]
    return f"{source['name']} ({source['examples']} examples, SHA-256 {digest}…)"
