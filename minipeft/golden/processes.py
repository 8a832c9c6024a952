"""Implementations in a process of their own: any program, and Python that may crash."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from minipeft import __version__
from minipeft.errors import InputError
from minipeft.golden.child import SOON, Child, Relay
from minipeft.golden.errors import (
    Accident,
    Late,
    NoAnswer,
    Refused,
    Unavailable,
    Unsupported,
)
from minipeft.golden.implementations import PEERS
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import Tensor
from minipeft.golden.vectors import Case, Question, Tensors

PROTOCOL = 1
ANSWERS = ("outputs", "refused", "unsupported", "accident")
PROGRAM_TIMEOUT, MODULE_TIMEOUT = 10.0, 120.0  # seconds that a case may take
LONGEST_TIMEOUT = 24 * 60 * 60.0
STARTS = 3  # how many times in a row a process may fail to start

# `-P`: no module in the working directory can replace one of Python's.
_WORKER = (
    "import sys; sys.path[:0] = {paths!r}; sys.path.append({root!r}); "
    "from minipeft.golden.worker import main; main({name!r})"
)


class Program:
    """A program in any language: one JSON case on stdin, one JSON answer on stdout."""

    def __init__(self, command: str, timeout: float) -> None:
        self.name = command
        self._command = split(command)
        self._timeout = timeout
        self._started = False

    def run(self, case: Case) -> Tensors:
        """Start the program, send the case, read the answer."""
        request = json.dumps(case.question.to_json()) + "\n"
        try:
            child = Child(self._command)
        except OSError as error:
            if self._started:
                raise NoAnswer(f"cannot be started again: {error}") from None
            raise Unavailable(_cannot_run(self.name, error)) from None
        self._started = True
        with closing(child):
            stdout = child.finish(request.encode(), self._timeout)
        return read_answer(read_object(stdout))

    def close(self) -> None:
        """Do nothing: every case had its own process."""


class Persistent:
    """A program that answers JSON line by line: start, run, run, ..., stop.

    A crash ends the process and fails the case; the next case starts it again.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        timeout: float,
        relay: Relay | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self._command = command
        self._timeout = timeout
        self._relay = relay
        self._folder = folder
        self._asked = 0
        self._failed_starts = 0
        self._offers: frozenset[str] | None = None  # None: not known
        try:
            self._child = self._start()
        except NoAnswer as accident:
            raise Unavailable(f"{name!r} does not start: {accident}.") from accident
        except OSError as error:
            raise Unavailable(_cannot_run(name, error)) from None

    def run(self, case: Case) -> Tensors:
        """Send the case as a line, read the answer as a line."""
        if self._offers is not None and case.operation not in self._offers:
            raise Unsupported(f"{self.name} has no function {case.operation}")
        if not self._child.running():
            self._restart()
        return read_answer(self._ask(case.question))

    def close(self) -> None:
        """Tell the program to stop, and end it."""
        if self._child.running():
            with suppress(NoAnswer):
                self._child.ask(_line({"command": "stop"}), SOON)
        self._child.close()

    def _restart(self) -> None:
        self._child.close()
        if self._failed_starts == STARTS:
            raise NoAnswer(f"did not start again {STARTS} times in a row")
        try:
            self._child = self._start()
        except (NoAnswer, Unavailable, OSError) as error:
            self._failed_starts += 1
            raise NoAnswer(f"does not start again: {error}") from None
        self._failed_starts = 0

    def _start(self) -> Child:
        child = Child(self._command, self._relay, self._folder)
        try:
            hello = {
                "command": "start",
                "protocol": PROTOCOL,
                "minipeft": __version__,
                "operations": list(OPERATIONS),
            }
            self._offers = _offers(read_object(child.ask(_line(hello), self._timeout)))
        except BaseException:
            child.close()
            raise
        return child

    def _ask(self, question: Question) -> dict[str, Any]:
        self._asked += 1
        request = {"command": "run", "id": self._asked, **question.to_json()}
        try:
            answer = read_object(self._child.ask(_line(request), self._timeout))
            if answer.pop("id", None) != self._asked:
                raise NoAnswer(f"the answer's id is not {self._asked}")
        except NoAnswer:
            self._child.close()  # its next line could be the answer to an earlier case
            raise
        return answer


def check_timeout(seconds: float | None, option: str) -> None:
    """Refuse a time-out that is no time, by the name of its option."""
    if seconds is not None and not 0 < seconds <= LONGEST_TIMEOUT:
        raise InputError(
            f"{option} is {seconds:g}; give seconds above 0, up to a day (86400)."
        )


def program(command: str, timeout: float, folder: Path | None = None) -> Persistent:
    """Start a program that speaks JSON lines, in a folder or here."""
    try:
        return Persistent(command, split(command), timeout, folder=folder)
    except Unavailable as reason:
        if not isinstance(reason.__cause__, Late):
            raise
        raise Unavailable(
            f"{command!r} does not start: {reason.__cause__} to the line that greets "
            "it; a program that takes one case and ends is asked without --persistent."
        ) from None


def worker(
    name: str, timeout: float, folder: Path | None = None, paths: Sequence[Path] = ()
) -> Persistent:
    """Start another interpreter for Python functions, which may crash it.

    Compiled code may access memory past the end of an array and crash. In its own
    process, a crash fails one case and does not end the run.
    """
    first = [str(path) for path in paths]
    root = str(Path(__file__).parents[2])
    code = _WORKER.format(paths=first, root=root, name=name)
    relay = None if name in PEERS else Relay(name)
    command = [sys.executable, "-P", "-c", code]
    return Persistent(name, command, timeout, relay, folder)


def split(command: str) -> list[str]:
    """Split a command line as a shell does.

    Raises:
        InputError: if the line is empty or a quotation mark is not closed.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"cannot run {command!r} ({error}); quote it again.") from None
    if not words or not words[0]:
        raise InputError(f"cannot run {command!r}; give an executable program.")
    return words


def read_object(text: bytes) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises:
        NoAnswer: if the line holds no JSON object.
    """
    try:
        found = json.loads(text)
    except UnicodeDecodeError:
        raise NoAnswer("its output is no UTF-8 text") from None
    except RecursionError:
        raise NoAnswer("its JSON is nested too deeply") from None
    except ValueError:
        start = text.strip()[:60].decode("utf-8", "backslashreplace")
        raise NoAnswer(f"no JSON answer, but {start!r}") from None
    if not isinstance(found, dict):
        raise NoAnswer("its answer is no JSON object")
    return found


def read_answer(answer: Mapping[str, Any]) -> Tensors:
    """Return the outputs, or raise the error that the answer contains.

    Raises:
        NoAnswer: also if the line is no answer.
    """
    if len(set(ANSWERS) & set(answer)) != 1:
        raise NoAnswer(f"the answer must hold one of {', '.join(ANSWERS)}")
    for key, verdict in _VERDICTS.items():
        if key in answer:
            raise verdict(_words(answer[key]))
    outputs = answer["outputs"]
    if not isinstance(outputs, dict):
        raise NoAnswer("outputs must be an object of named tensors")
    try:
        return {name: Tensor.from_json(value) for name, value in outputs.items()}
    except (InputError, RecursionError) as error:
        raise NoAnswer(f"its outputs are no tensors: {error}") from None


_VERDICTS: dict[str, type[Exception]] = {
    "refused": Refused,
    "unsupported": Unsupported,
    "accident": Accident,
}


def _words(reason: object) -> str:
    return reason if isinstance(reason, str) else "(no sentence that says why)"


def _offers(greeting: Mapping[str, Any]) -> frozenset[str] | None:
    if "unavailable" in greeting:
        raise Unavailable(_words(greeting["unavailable"]))
    if "ready" not in greeting:
        raise NoAnswer("the answer to start must hold ready or unavailable")
    offers = greeting.get("offers")
    if offers is None:
        return None
    if not isinstance(offers, list) or not all(isinstance(o, str) for o in offers):
        raise NoAnswer("what it offers is no list of names")
    return frozenset(offers)


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _cannot_run(name: str, error: OSError) -> str:
    return f"cannot run {name!r} ({error}); give an executable program."
