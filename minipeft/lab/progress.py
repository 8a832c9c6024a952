"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

LINES = 10
"""How many lines a run prints where nobody watches."""


class Bar(Protocol):
    """What the training loop tells."""

    def advance(self, loss: float) -> None:
        """One more step is done; its loss."""

    def note(self, validation: float) -> None:
        """The newest validation loss."""


class _Meter:
    """Smooth loss and time per step: what both kinds of display show."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.done, self.first = steps, done, done
        self.began = time.perf_counter()
        self.smooth: float | None = None
        self.validation: float | None = None

    def take(self, loss: float) -> None:
        self.done += 1
        before = loss if self.smooth is None else self.smooth
        self.smooth = 0.95 * before + 0.05 * loss

    @property
    def per_step(self) -> float:
        """Seconds a step, validation included."""
        return (time.perf_counter() - self.began) / max(1, self.done - self.first)

    @property
    def text(self) -> str:
        """Loss, validation loss and time per step."""
        parts = [f"loss {self.smooth:.3f}"]
        if self.validation is not None:
            parts.append(f"validation {self.validation:.3f}")
        parts.append(f"{1000 * self.per_step:.0f} ms/step")
        return "  ".join(parts)


class _Lines:
    """For logs and captured output."""

    def __init__(self, meter: _Meter) -> None:
        self.meter = meter
        self.every = max(1, meter.steps // LINES)

    def advance(self, loss: float) -> None:
        meter = self.meter
        meter.take(loss)
        if meter.done % self.every == 0 or meter.done == meter.steps:
            left = (meter.steps - meter.done) * meter.per_step
            line = f"step {meter.done}/{meter.steps}  {meter.text}  {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def note(self, validation: float) -> None:
        self.meter.validation = validation


class _Rich:
    """For people."""

    def __init__(self, meter: _Meter, progress: RichProgress) -> None:
        self.meter, self.progress = meter, progress
        self.task = progress.add_task(
            "", total=meter.steps, completed=meter.done, shown=""
        )

    def advance(self, loss: float) -> None:
        self.meter.take(loss)
        self.progress.update(self.task, advance=1, shown=self.meter.text)

    def note(self, validation: float) -> None:
        self.meter.validation = validation


@contextlib.contextmanager
def bar(steps: int, done: int = 0) -> Iterator[Bar]:
    """Show a run of `steps` steps of which `done` are behind."""
    meter = _Meter(steps, done)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(meter)
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console) as progress:
        yield _Rich(meter, progress)
