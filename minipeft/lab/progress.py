"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

MEAN_OF = 20
"""The number of steps in the mean."""
LINES = 10
"""The number of lines that a run prints without a terminal."""


class Bar(ABC):
    """Step, its loss, the mean of the last losses, time per step."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.done, self.first = steps, done, done
        self.began = time.perf_counter()
        self.losses: deque[float] = deque(maxlen=MEAN_OF)
        self.validation: float | None = None

    def advance(self, loss: float) -> None:
        """Count one more step, with its loss."""
        self.done += 1
        self.losses.append(loss)
        self.draw()

    @abstractmethod
    def draw(self) -> None:
        """Show the new state."""

    @abstractmethod
    def note(self, line: str) -> None:
        """Print a line that stays."""

    @property
    def per_step(self) -> float:
        """Seconds per step, with validation."""
        return (time.perf_counter() - self.began) / max(1, self.done - self.first)

    @property
    def text(self) -> str:
        """Loss of the step, mean of the last ones, validation loss, time per step."""
        mean = sum(self.losses) / len(self.losses)
        parts = [f"loss {self.losses[-1]:.3f}"]
        if len(self.losses) > 1:
            parts.append(f"(mean of {len(self.losses)} steps {mean:.3f})")
        if self.validation is not None:
            parts.append(f"validation {self.validation:.3f}")
        parts.append(f"{1000 * self.per_step:.0f} ms/step")
        return "  ".join(parts)


class _Lines(Bar):
    """Plain lines, for logs and captured output."""

    def draw(self) -> None:
        if self.done % max(1, self.steps // LINES) and self.done != self.steps:
            return
        left = (self.steps - self.done) * self.per_step
        line = f"step {self.done}/{self.steps}  {self.text}  {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class _Rich(Bar):
    """A bar on a terminal."""

    def __init__(self, steps: int, done: int, progress: Progress) -> None:
        super().__init__(steps, done)
        self.progress = progress
        self.task = progress.add_task("", total=steps, completed=done, shown="")

    def draw(self) -> None:
        self.progress.update(self.task, completed=self.done, shown=self.text)

    def note(self, line: str) -> None:
        self.progress.console.print(line, highlight=False)


@contextlib.contextmanager
def bar(steps: int, done: int = 0) -> Iterator[Bar]:
    """Show the progress of a run of `steps` steps, of which `done` are done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(steps, done)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Rich(steps, done, progress)
