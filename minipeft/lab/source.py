"""What the runs in a folder of checkpoints learn from: a resumed run has the same."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from minipeft.errors import InputError
from minipeft.lab.files import write_atomic
from minipeft.lab.task import Task

KEPT = "data.json"


def keep_source(folder: Path | None, name: str, task: Task, resume: bool) -> None:
    """Write what runs learn from beside their checkpoints; resumed, compare it.

    Args:
        folder: of the checkpoints; None: nothing is written.
        name: of the data, for a person.
        task: with all examples, as the data hold them.
        resume: whether the runs in the folder go on.

    Raises:
        InputError: the runs in the folder learn from other examples; the file is
            damaged.
    """
    if folder is None:
        return
    sides = json.dumps([task.train, task.validation]).encode()
    count = len(task.train) + len(task.validation)
    digest = hashlib.sha256(sides).hexdigest()
    now = {"name": name, "examples": count, "sha256": digest}
    path = folder / KEPT
    if resume and path.exists() and any(folder.glob("run-*.safetensors")):
        before = _read(path)
        if before["sha256"] != digest:
            raise InputError(
                f"{folder} holds runs on {_said(before)}, and --resume would go on "
                f"with {_said(now)}; give the data of those runs, or start in another "
                "folder without --resume"
            )
    write_atomic(path, (json.dumps(now) + "\n").encode())


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text("utf-8"))
        return {key: found[key] for key in ("name", "examples", "sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); start again") from None


def _said(source: Mapping[str, object]) -> str:
    digest = str(source["sha256"])[:8]
    return f"{source['name']} ({source['examples']} examples, SHA-256 {digest}…)"
