"""What can be verified: a column, a peer, a module of functions, or a program."""

import importlib
import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from minipeft.errors import InputError
from minipeft.golden.errors import Accident, Refused, Unsupported
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import Array, Tensor, numpy_dtype
from minipeft.golden.vectors import Case, Tensors

BUILT_IN = ("reference", "torch", "cupy", "bitsandbytes", "peft", "torchao")

# Nobody refuses on purpose with these: a wrong index is a wrong index.
ACCIDENTS = (ArithmeticError, LookupError, AttributeError)


class Implementation(Protocol):
    """Whatever answers a case: outputs, or Unsupported, Refused, Accident."""

    name: str

    def run(self, case: Case) -> Tensors:
        """Return the outputs by name."""


class Functions:
    """Plain Python functions, NumPy in and NumPy out."""

    def __init__(
        self, name: str, find: Callable[[str], Callable[..., Any] | None]
    ) -> None:
        self.name = name
        self._find = find

    def find(self, operation: str) -> Callable[..., Any]:
        """Return the function that has the operation's name."""
        function = self._find(operation)
        if function is None:
            raise Unsupported(f"{self.name} has no function {operation}")
        return function

    def run(self, case: Case) -> Tensors:
        """Call the function, every argument by name."""
        function = self.find(case.operation)
        arrays = {name: tensor.to_array() for name, tensor in case.inputs.items()}
        outputs = _outputs(case, _call(function, arrays, plain_values(case.parameters)))
        _check_unchanged(arrays, case.inputs)
        return outputs


class Program:
    """Any other language: one JSON case on stdin, one JSON answer on stdout."""

    def __init__(self, command: str, timeout: float) -> None:
        self.name = command
        self._command = shlex.split(command)
        self._timeout = timeout

    def run(self, case: Case) -> Tensors:
        """Start the program, send the case, read the answer."""
        answer = self._answer(case)
        if "unsupported" in answer:
            raise Unsupported(str(answer["unsupported"]))
        if "refused" in answer:
            raise Refused(str(answer["refused"]))
        outputs = answer["outputs"]
        if not isinstance(outputs, dict):
            raise self._broken(case, "its outputs are no object of named tensors")
        try:
            return {name: Tensor.from_json(value) for name, value in outputs.items()}
        except InputError as error:
            raise self._broken(case, f"an output is damaged: {error}") from error

    def _answer(self, case: Case) -> dict[str, Any]:
        request = {
            "operation": case.operation,
            "parameters": case.parameters,
            "inputs": {name: t.to_json() for name, t in case.inputs.items()},
        }
        stdout = self._stdout(case, json.dumps(request) + "\n")
        try:
            answer = json.loads(stdout)
        except ValueError:
            start = stdout.strip()[:60]
            raise self._broken(case, f"it printed no JSON: {start!r}") from None
        keys = {"outputs", "refused", "unsupported"}
        if not isinstance(answer, dict) or len(keys & set(answer)) != 1:
            raise self._broken(
                case,
                "its answer is no object with one of outputs, refused, unsupported",
            )
        return answer

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
                case, f"it gave no answer within {self._timeout:g} s (--timeout)"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot run {self.name!r}: {error}; give an executable program."
            ) from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it wrote no message"])[-1]
            raise self._broken(case, f"it ended with code {done.returncode}: {last}")
        return done.stdout

    def _broken(self, case: Case, what: str) -> InputError:
        return InputError(
            f"{self.name!r} failed on {case.operation} tcId {case.tcId}: {what}."
        )


def implementation(name: str) -> Functions:
    """Find an implementation by name: built in, or a module of plain functions.

    Raises:
        InputError: if there is no such module.
        Unavailable: if it needs a package or a device that is missing here.
    """
    if name in BUILT_IN:
        package = f"minipeft.golden.drivers.{name}"
        importlib.import_module(package)  # says what is missing
        return Functions(name, lambda operation: _driver(package, operation))
    module = _stranger(name)
    return Functions(name, lambda operation: getattr(module, operation, None))


def _driver(package: str, operation: str) -> Callable[..., Any] | None:
    path = f"{package}.{OPERATIONS[operation].row}"
    if importlib.util.find_spec(path) is None:
        return None
    return getattr(importlib.import_module(path), operation, None)


def _stranger(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:  # a console script does not look here
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"cannot import {name!r} ({error}); choose one of {', '.join(BUILT_IN)} "
            "or name a module of plain functions as package.module."
        ) from error


def plain_values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters as a function receives them."""
    convert: dict[str, Callable[[Any], Any]] = {"dtype": numpy_dtype, "shape": tuple}
    return {
        name: convert[name](value) if name in convert else value
        for name, value in parameters.items()
    }


def _call(
    function: Callable[..., Any], arrays: Mapping[str, Array], plain: Mapping[str, Any]
) -> Any:
    try:
        return function(**arrays, **plain)
    except Unsupported:
        raise
    except ACCIDENTS as error:
        raise Accident(f"{type(error).__name__}: {error}") from error
    except Exception as error:  # a stranger may refuse with any exception
        raise Refused(f"{type(error).__name__}: {error}") from error


def _outputs(case: Case, returned: Any) -> Tensors:
    names = OPERATIONS[case.operation].outputs
    values = returned if isinstance(returned, tuple) else (returned,)
    if len(values) != len(names):
        signature = OPERATIONS[case.operation].signature(case.operation)
        raise Accident(f"returned {len(values)} values; the call is {signature}")
    return {n: Tensor.from_array(v) for n, v in zip(names, values, strict=True)}


def _check_unchanged(arrays: Mapping[str, Array], inputs: Tensors) -> None:
    for name, array in arrays.items():
        if Tensor.from_array(array) != inputs[name]:
            raise Accident(f"overwrote its argument {name}")
