"""A process with pipes, limited in time and in bytes of output.

The process runs in a session of its own, so that all processes that it starts end with
it. If one of them keeps a pipe open, nothing waits for that pipe.
"""

import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO

from minipeft.golden.errors import Late, NoAnswer, Unavailable

LARGEST = 16 * 2**20  # bytes of one answer; the answers to our vectors have thousands
CHUNK = 1 << 16
TAIL = 4096  # bytes of stderr that are kept; a report quotes a line
TICK = 0.05  # seconds between two checks of a process whose pipe stays open
SOON = 1.0  # seconds for a process to end after the end of its output
SHOWN = 2**20  # bytes that one implementation may print on our stderr


class Relay:
    """Shows on our stderr what the processes of an implementation print, up to a limit.

    Args:
        name: of the implementation.
        left: bytes that are shown, of all its processes together.
    """

    def __init__(self, name: str, left: int = SHOWN) -> None:
        self._name, self._left = name, left

    def show(self, chunk: bytes) -> None:
        """Write a chunk to stderr, as far as there is room."""
        if not self._left:
            return
        text = chunk[: self._left].decode("utf-8", "backslashreplace")
        self._left -= len(chunk[: self._left])
        if not self._left:
            text += f"\nminipeft: what else {self._name!r} prints is not shown.\n"
        with suppress(OSError, ValueError):  # nobody reads it any more
            sys.stderr.write(text)
            sys.stderr.flush()


class Child:
    """One process and its pipes."""

    def __init__(
        self,
        command: Sequence[str],
        relay: Relay | None = None,
        folder: Path | None = None,
    ) -> None:
        """Start it; messages quote a line of its stderr.

        Args:
            command: the program and its arguments.
            relay: shows its stderr; None: nothing is shown.
            folder: where it runs; None: here.

        Raises:
            OSError: if it cannot be started.
        """
        if os.name != "posix":
            raise Unavailable("programs and modules need POSIX pipes; use WSL here.")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            start_new_session=True,
        )
        self._output = bytearray()  # output of stdout that was not returned yet
        self._tail = bytearray()
        self._relay = relay
        self._ends_stdin = False
        self._closed = False
        self._open = selectors.DefaultSelector()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                self._open.register(pipe, selectors.EVENT_READ)

    def ask(self, line: bytes, seconds: float) -> bytes:
        """Send a line and return the next line of its stdout.

        Raises:
            Late: if no line comes in time.
            NoAnswer: if the process ends, or writes too much.
        """
        self._exchange(line, seconds, lambda: b"\n" in self._output)
        if b"\n" not in self._output:
            raise NoAnswer(self._ending())
        answer, _, self._output = self._output.partition(b"\n")
        return bytes(answer)

    def finish(self, request: bytes, seconds: float) -> bytes:
        """Send all of its stdin and return all of its stdout.

        Raises:
            Late: if the process does not end in time.
            NoAnswer: if the exit code is not 0, or the process writes too much.
        """
        self._ends_stdin = True
        self._exchange(request, seconds, lambda: False)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        if self.running():
            raise Late(f"did not end within {seconds:g} s (--timeout)")
        if self._process.returncode:
            raise NoAnswer(self._ending())
        return bytes(self._output)

    def running(self) -> bool:
        """Tell whether the process is still running."""
        return self._process.poll() is None

    def close(self, grace: float = 0.0) -> None:
        """Wait `grace` seconds, then end the process and all that it has started."""
        if self._closed:
            return
        self._closed = True
        stdin = self._process.stdin
        if stdin is not None:
            with suppress(OSError):
                stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._open.close()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _exchange(
        self, request: bytes, seconds: float, done: Callable[[], bool]
    ) -> None:
        """Write and read until `done`, the end of stdout, or the end of the process."""
        self._send(request)
        deadline = monotonic() + seconds
        while not done() and self._listens_to(self._process.stdout):
            ended = not self.running()
            ready = self._open.select(min(TICK, max(0.0, deadline - monotonic())))
            if ended and not ready:
                return  # another process still holds the pipe open
            for key, _ in ready:
                self._serve(key)
            if len(self._output) > LARGEST:
                self.close()
                raise NoAnswer(f"wrote more than {LARGEST >> 20} MB as one answer")
            if monotonic() > deadline:
                self.close()
                raise Late(f"no answer within {seconds:g} s (--timeout)")

    def _send(self, request: bytes) -> None:
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            return
        if self._listens_to(stdin):  # the last request was not read
            self._open.unregister(stdin)
        self._open.register(stdin, selectors.EVENT_WRITE, memoryview(request))

    def _serve(self, key: selectors.SelectorKey) -> None:
        pipe = key.fileobj
        if pipe is self._process.stdin:
            return self._write(key)
        chunk = os.read(key.fd, CHUNK)
        if not chunk:
            self._open.unregister(pipe)
        elif pipe is self._process.stdout:
            self._output += chunk
        else:
            self._hear(chunk)
        return None

    def _hear(self, chunk: bytes) -> None:
        self._tail = (self._tail + chunk)[-TAIL:]
        if self._relay is not None:
            self._relay.show(chunk)

    def _write(self, key: selectors.SelectorKey) -> None:
        rest: memoryview = key.data
        try:
            rest = rest[os.write(key.fd, rest) :]
        except BrokenPipeError:  # the process has ended, or closed its stdin
            rest = rest[len(rest) :]
        if len(rest):
            self._open.modify(key.fileobj, selectors.EVENT_WRITE, rest)
            return
        self._open.unregister(key.fileobj)
        if self._ends_stdin and self._process.stdin is not None:
            self._process.stdin.close()

    def _listens_to(self, pipe: IO[bytes] | None) -> bool:
        return any(key.fileobj is pipe for key in self._open.get_map().values())

    def _ending(self) -> str:
        """Say how the process ended, with the last words on its stderr."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SOON)
        code = self._process.poll()
        if self._listens_to(self._process.stderr):
            assert self._process.stderr is not None
            with suppress(BlockingIOError):
                for _ in range(LARGEST // CHUNK):  # a process left behind may go on
                    if not (chunk := os.read(self._process.stderr.fileno(), CHUNK)):
                        break
                    self._hear(chunk)
        self.close()
        if code is None:
            return "the process closed its output"
        how = f"ended with code {code}" if code >= 0 else f"was ended by {_name(-code)}"
        lines = self._tail.decode("utf-8", "backslashreplace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f"the process {how}" + (f": {_message(said)}" if said else "")


# What follows the message of an error that nobody caught: Node.js's version and
# properties, Rust's advice, frames of a stack.
_AFTER = re.compile(r"Node\.js v\d|note: .*RUST_BACKTRACE|\(Use `node --trace|at \S")
_ERROR = re.compile(
    r"(Uncaught |Caused by: |Exception in .*)?[\w.]*(Error|Exception)\b"
)


def _message(lines: Sequence[str]) -> str:
    """Return the last line, or the one with the message, where more lines follow it."""
    if not _AFTER.match(lines[-1]):
        return lines[-1]
    for at, line in enumerate(lines):
        if " panicked at " in line:  # Rust: the message is the line below
            return lines[at + 1]
    said = [line for line in lines if _ERROR.match(line)]
    return (said or [line for line in lines if not _AFTER.match(line)] or lines)[-1]


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"
