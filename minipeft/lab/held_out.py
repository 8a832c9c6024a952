"""How many held-out examples a model is judged on: as many as its time allows."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.lab import text
from minipeft.lab.files import read_record, write_atomic
from minipeft.lab.task import Task
from minipeft.lab.train import loss

SECONDS = 10.0
"""What one validation may take."""
FEWEST = 16
"""Examples that a loss is taken on however slow the model is."""
ROWS = 4
"""Examples a batch: the logits of a large vocabulary need memory."""
KEPT = "held-out.json"


@dataclass(frozen=True)
class HeldOut:
    """A task with the held-out examples that a model is judged on.

    Attributes:
        task: with these examples.
        every: held-out examples that there are.
        seconds: that one validation takes, by the time of one batch; None: not timed.
    """

    task: Task
    every: int
    seconds: float | None

    def __str__(self) -> str:
        count = len(self.task.validation)
        took = "" if self.seconds is None else f", {self.seconds:.1f} s a validation"
        return f"held out: {count} of {self.every} examples{took}"


def sized(
    task: Task,
    model: Any,
    tokenizer: Any,
    count: int | None = None,
    seconds: float = SECONDS,
) -> HeldOut:
    """Return the task with a held-out part that this model judges in a given time.

    The examples are taken evenly from all. A batch is timed, after one that warms up.

    Args:
        task: with all examples.
        model: that will be judged.
        tokenizer: of the model.
        count: of examples, if it is given; nothing is timed then.
        seconds: that one validation may take.

    Raises:
        InputError: the count is below 1, or above the number of held-out examples.
    """
    every, task = len(task.validation), replace(task, rows=ROWS)
    check_count(task, count)
    if count is not None:
        return HeldOut(task.judged_by(count), every, None)
    probe = task.judged_by(ROWS)
    size = (ROWS, task.length)
    batch = text.example_batches(tokenizer, probe.validation, size)
    loss(model, batch)
    began = time.perf_counter()
    loss(model, batch)
    one = (time.perf_counter() - began) / len(probe.validation)
    count = min(every, max(FEWEST, int(seconds / one)))
    return HeldOut(task.judged_by(count), every, count * one)


def check_count(task: Task, count: int | None) -> None:
    """Check that a task has so many held-out examples; this needs no model.

    Args:
        task: with all examples.
        count: of examples; None: as many as the time allows.

    Raises:
        InputError: the count is below 1, or above the number of held-out examples.
    """
    every = len(task.validation)
    if count is not None and not 1 <= count <= every:
        raise InputError(
            f"--held-out is {count}, and of these data at most {every} can be held "
            f"out; give 1 to {every}"
        )


def kept_count(folder: Path | None) -> int | None:
    """Return the number that `keep` wrote, or None.

    Raises:
        InputError: a file of that name was not written by a run.
    """
    kept = None if folder is None else read_record(folder / KEPT, {"count": int})
    return None if kept is None else int(kept["count"])


def keep(folder: Path | None, found: HeldOut) -> None:
    """Write the number of examples beside the checkpoints of a run.

    A resumed run is judged on the same ones, however long they take then.

    Raises:
        InputError: a file of that name was not written by a run; it stays.
    """
    if folder is not None:
        kept_count(folder)  # refuses another's file
        content = {"count": len(found.task.validation)}
        write_atomic(folder / KEPT, (json.dumps(content) + "\n").encode())
