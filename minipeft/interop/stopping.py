"""Ctrl-C and SIGTERM in a command on files: clean up, one sentence, 128 + the signal.

Without a handler SIGTERM ends Python at once, and a half-written folder stays.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType

Run = Callable[[argparse.Namespace], int]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
WRITTEN = ("out", "json", "fix")
"""The options that name what a command writes."""


class Stopped(KeyboardInterrupt):
    """A signal to end; its number is the argument."""


def stoppable(run: Run) -> Run:
    """Return a command that ends at a signal with one sentence and the usual code."""

    @wraps(run)
    def runs(options: argparse.Namespace) -> int:
        places = [p for p in (getattr(options, name, None) for name in WRITTEN) if p]
        before = [_state(place) for place in places]
        try:
            with _raising():
                return run(options)
        except Stopped as stopped:
            pairs = zip(places, before, strict=True)
            new = [str(place) for place, state in pairs if _state(place) != state]
            said = f"look at {', '.join(new)}" if new else "nothing was written"
            print(f"minipeft: stopped; {said}", file=sys.stderr)
            return 128 + int(stopped.args[0])

    return runs


@contextmanager
def _raising() -> Iterator[None]:
    """Raise `Stopped` at the first signal; later ones do not disturb the clean-up."""

    def stop(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    before = {}
    if current_thread() is main_thread():  # Python sets no handler elsewhere
        found = {number: signal.getsignal(number) for number in SIGNALS}
        # What the caller ignores, as a shell does for jobs in the background, stays so.
        before = {n: old for n, old in found.items() if old is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _state(path: Path) -> dict[str, tuple[int, int]]:
    """Return the file, or all files of a folder, with the marks of their contents."""
    inside = (Path(at, file) for at, _, files in os.walk(path) for file in files)
    stats = {str(f): f.lstat() for f in ([path] if path.is_file() else inside)}
    return {file: (stat.st_ino, stat.st_mtime_ns) for file, stat in stats.items()}
