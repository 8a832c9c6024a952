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


def keep_source(folder: Path | None, name: str, task: Task, resume: bool) -> None:
    """Write what runs learn from beside their checkpoints; resumed, compare it.

    Args:
        folder: of the checkpoints; None: nothing is written.
        name: of the data, for a person.
        task: with all examples, as the data hold them.
        resume: whether the runs in the folder go on.

    Raises:
        InputError: the runs in the folder learn from other examples; a file of that
            name was not written by a run.
    """
    if folder is None:
        return
    sides = json.dumps([task.train, task.validation]).encode()
    count = len(task.train) + len(task.validation)
    digest = hashlib.sha256(sides).hexdigest()
    now = {"name": name, "examples": count, "sha256": digest}
    path = folder / KEPT
    before = read_record(path, KINDS)
    goes_on = resume and any(folder.glob("run-*.safetensors"))
    if before and goes_on and before["sha256"] != digest:
        raise InputError(
            f"{folder} holds runs on {_said(before)}, and --resume would go on "
            f"with {_said(now)}; give the data of those runs, or start in another "
            "folder without --resume"
        )
    write_atomic(path, (json.dumps(now) + "\n").encode())


def _said(source: Mapping[str, object]) -> str:
    digest = str(source["sha256"])[:8]
    return f"{source['name']} ({source['examples']} examples, SHA-256 {digest}…)"
