"""Progress on long work: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0
"""Seconds between two plain lines."""


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Show how far some work is, on stderr.

    Args:
        what: is done, such as `merging`.
        total: how many steps there are; None: not known.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what, total)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    name = TextColumn("{task.fields[name]}", markup=False)
    with Progress(*columns, name, console=console, transient=True) as shown:
        task = shown.add_task(what, total=total, name="")
        yield lambda name: shown.update(task, advance=1, name=name)


def _lines(what: str, total: int | None) -> Callable[[str], None]:
    """Return a step that prints a line if the last one, or the start, is long ago."""
    last, done = time.monotonic(), 0
    of = "" if total is None else f" of {total}"

    def step(name: str) -> None:
        nonlocal last, done
        done += 1
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(f"{what}: {done}{of}, {name}", file=sys.stderr)

    return step
