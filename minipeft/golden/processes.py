"""Implementations in a process of their own: any program, and Python that may crash."""

import json
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Timer
from typing import Any

from minipeft.errors import InputError
from minipeft.golden.errors import Accident, Refused, Unavailable, Unsupported
from minipeft.golden.implementations import PEERS
from minipeft.golden.tensors import Tensor
from minipeft.golden.vectors import Case, Tensors

ANSWERS = ("outputs", "refused", "unsupported", "accident")


class Program:
    """Any other language: one JSON case on stdin, one JSON answer on stdout."""

    def __init__(self, command: str, timeout: float) -> None:
        self.name = command
        self._command = shlex.split(command)
        self._timeout = timeout

    def run(self, case: Case) -> Tensors:
        """Start the program, send the case, read the answer."""
        stdout = self._stdout(case, json.dumps(case.question.to_json()) + "\n")
        try:
            return read_answer(stdout)
        except InputError as error:
            raise self._broken(case, str(error)) from error

    def close(self) -> None:
        """Do nothing: every case had its own process."""

    def _stdout(self, case: Case, request: str) -> str:
        try:
            done = subprocess.run(
                self._command,
                input=request,
                capture_output=True,
                text=True,
                timeout=self._timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise self._broken(
                case, f"no answer within {self._timeout:g} s (--timeout)."
            ) from None
        except UnicodeDecodeError:
            raise self._broken(case, "its output is no UTF-8 text.") from None
        except (OSError, IndexError) as error:
            raise InputError(
                f"cannot run {self.name!r} ({error}); give an executable program."
            ) from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it wrote no message"])[-1]
            raise self._broken(case, f"{_ending(done.returncode)}: {last}")
        return done.stdout

    def _broken(self, case: Case, what: str) -> InputError:
        return InputError(f"{self.name!r}, {case.operation} tcId {case.tcId}: {what}")


class Worker:
    """Python functions in another interpreter, which a crash ends and a case restarts.

    Compiled code of others may run past the end of an array. Here that is one failed
    case, not the end of the run.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.name = name
        self._timeout = timeout
        self._process = self._start()

    def run(self, case: Case) -> Tensors:
        """Send the case as a line, read the answer as a line."""
        if self._process.poll() is not None:
            self._process = self._start()
        return read_answer(self._ask(json.dumps(case.question.to_json())))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minipeft.golden.worker", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self.name in PEERS else None,
            text=True,
        )
        greeting = json.loads(self._ask(""))
        if "unavailable" in greeting:
            self.close()
            raise Unavailable(greeting["unavailable"])
        return self._process

    def _ask(self, line: str) -> str:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = Timer(self._timeout, process.kill)
        timer.start()
        with suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        late = not timer.is_alive()
        timer.cancel()
        if answer:
            return answer
        process.communicate()
        if late:
            raise Accident(f"no answer within {self._timeout:g} s")
        raise Accident(f"the process {_ending(process.returncode)}")


def read_answer(text: str) -> Tensors:
    """Return the outputs, or raise what the answer says instead.

    Raises:
        InputError: if it is no answer at all.
    """
    try:
        answer = json.loads(text)
    except ValueError:
        raise InputError(f"no JSON answer, but {text.strip()[:60]!r}.") from None
    if not isinstance(answer, dict) or len(set(ANSWERS) & set(answer)) != 1:
        raise InputError(f"the answer must hold one of {', '.join(ANSWERS)}.")
    for key, verdict in _VERDICTS.items():
        if key in answer:
            raise verdict(str(answer[key]))
    outputs: Any = answer["outputs"]
    if not isinstance(outputs, dict):
        raise InputError("outputs must be an object of named tensors.")
    return {name: Tensor.from_json(value) for name, value in outputs.items()}


_VERDICTS: dict[str, type[Exception]] = {
    "refused": Refused,
    "unsupported": Unsupported,
    "accident": Accident,
}


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"
