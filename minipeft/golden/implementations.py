"""What can be verified: a column, a peer, a module of functions, or a program."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from minipeft.errors import InputError
from minipeft.golden.errors import Accident, Refused, Unsupported
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import Array, Tensor, numpy_dtype
from minipeft.golden.vectors import Case, Question, Tensors

COLUMNS = ("reference", "torch", "cupy")
PEERS = ("bitsandbytes", "peft", "torchao")
BUILT_IN = (*COLUMNS, *PEERS)

# Nobody refuses on purpose with these: a wrong index is a wrong index.
ACCIDENTS = (ArithmeticError, LookupError, AttributeError)


@runtime_checkable
class Implementation(Protocol):
    """Whatever answers a case: outputs, or Unsupported, Refused, Accident."""

    name: str

    def run(self, case: Case) -> Tensors:
        """Return the outputs by name."""

    def close(self) -> None:
        """Let go of what it holds."""


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
        return self.answer(case.question)

    def close(self) -> None:
        """Do nothing: functions hold nothing."""

    def answer(self, question: Question) -> Tensors:
        """Call the function, every argument by name."""
        function = self.find(question.operation)
        arrays = {name: tensor.to_array() for name, tensor in question.inputs.items()}
        returned = _call(function, arrays, plain_values(question.parameters))
        outputs = _outputs(question.operation, returned)
        _check_unchanged(arrays, question.inputs)
        return outputs


def functions(name: str) -> Functions:
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


def plain_values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters as a function receives them."""
    convert: dict[str, Callable[[Any], Any]] = {"dtype": numpy_dtype, "shape": tuple}
    return {
        name: convert[name](value) if name in convert else value
        for name, value in parameters.items()
    }


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


def _outputs(operation: str, returned: Any) -> Tensors:
    names = OPERATIONS[operation].outputs
    values = returned if isinstance(returned, tuple) else (returned,)
    if len(values) != len(names):
        signature = OPERATIONS[operation].signature(operation)
        raise Accident(f"returned {len(values)} values; the call is {signature}")
    return {n: Tensor.from_array(v) for n, v in zip(names, values, strict=True)}


def _check_unchanged(arrays: Mapping[str, Array], inputs: Tensors) -> None:
    for name, array in arrays.items():
        if Tensor.from_array(array) != inputs[name]:
            raise Accident(f"overwrote its argument {name}")
