"""The implementations to verify: a column, a peer, a module of functions, a program."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from minipeft.errors import InputError
from minipeft.golden.errors import (
    OTHER_CALL,
    Accident,
    Refused,
    Unsupported,
    describe,
)
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import ITEMSIZE, Array, Tensor, numpy_dtype
from minipeft.golden.vectors import Case, Question, Tensors

COLUMNS = ("reference", "torch", "cupy")
PEERS = ("bitsandbytes", "peft", "torchao")
BUILT_IN = (*COLUMNS, *PEERS)

LARGEST = 4 * 2**20  # bytes of one output; our vectors have far smaller ones

# Errors that are accidents and never a deliberate refusal.
ACCIDENTS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,  # a library that cannot be loaded
    RecursionError,
    StopIteration,
    SystemExit,
)


@runtime_checkable
class Implementation(Protocol):
    """An object that answers cases: with outputs, Unsupported, Refused or Accident."""

    name: str

    def run(self, case: Case) -> Tensors:
        """Return the outputs by name."""

    def close(self) -> None:
        """Release the resources of the implementation."""


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
        if not callable(function):
            raise Unsupported(f"{self.name} has no function {operation}")
        return function

    def offers(self, operation: str) -> bool:
        """Tell whether the implementation has such a function."""
        try:
            return callable(self._find(operation))
        except Unsupported:  # which it says once it is asked
            return True

    def run(self, case: Case) -> Tensors:
        """Call the function, every argument by name."""
        return self.answer(case.question)

    def close(self) -> None:
        """Do nothing: functions hold no resources."""

    def answer(self, question: Question) -> Tensors:
        """Call the function, every argument by name."""
        function = self.find(question.operation)
        arrays = {name: tensor.to_array() for name, tensor in question.inputs.items()}
        plain = plain_values(deepcopy(question.parameters))
        arguments = {**arrays, **plain}
        _check_signature(question.operation, function, arguments)
        returned = _call(function, arguments)
        outputs = _outputs(question.operation, returned)
        _check_unchanged(arrays, question.inputs)
        if plain != plain_values(question.parameters):
            raise Accident("overwrote a setting in its arguments")
        return outputs


def functions(name: str) -> Functions:
    """Find an implementation by name: built in, or a module of plain functions.

    Raises:
        InputError: if there is no such module.
        Unavailable: if a package or a device that it needs is missing.
    """
    if name in BUILT_IN:
        package = f"minipeft.golden.drivers.{name}"
        importlib.import_module(package)  # raises if a package is missing
        return Functions(name, lambda operation: _driver(package, operation))
    module = _stranger(name)
    return Functions(name, lambda operation: getattr(module, operation, None))


def plain_values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters in the types that a function receives."""
    convert: dict[str, Callable[[Any], Any]] = {"dtype": numpy_dtype, "shape": tuple}
    return {
        name: convert[name](value) if name in convert else value
        for name, value in parameters.items()
    }


def _driver(package: str, operation: str) -> Callable[..., Any] | None:
    path = f"{package}.{OPERATIONS[operation].row}"
    if importlib.util.find_spec(path) is None:
        return None
    try:
        return getattr(importlib.import_module(path), operation, None)
    except ModuleNotFoundError as error:  # a package that this row alone needs
        name = error.name or ""
        if name.startswith("minipeft"):
            raise
        raise Unsupported(f"{path} needs {name}; run: pip install {name}") from None


def _stranger(name: str) -> ModuleType:
    if name.endswith(".py"):
        raise InputError(f"there is no module {name!r}; {_for_file(Path(name))}.")
    here = str(Path.cwd())
    sys.path.append(here)  # at the end: a torch.py here must not hide torch
    try:
        _import_from(here, name.partition(".")[0])
        return importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot import {name!r} ({describe(error)}); choose one of "
            f"{', '.join(BUILT_IN)} or name a module of plain functions as "
            "package.module."
        ) from error


def _for_file(path: Path) -> str:
    """Say how a file is given as a module."""
    if path.is_absolute() or ".." in path.parts:
        return f"stand in {path.parent} and give {path.stem!r} for the file"
    return f"give {'.'.join(path.with_suffix('').parts)!r} for the file"


def _import_from(folder: str, top: str) -> None:
    """Import from the folder before installed packages, but not before Python's own."""
    if top in sys.modules or top in sys.stdlib_module_names:
        return
    spec = PathFinder.find_spec(top, [folder])
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules[top] = module
        spec.loader.exec_module(module)


def _check_signature(
    operation: str, function: Callable[..., Any], arguments: Mapping[str, Any]
) -> None:
    """Raise an error if a function takes other arguments than those of the table."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a compiled function has no signature
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        call = OPERATIONS[operation].signature(operation)
        raise Accident(f"{OTHER_CALL} ({error}); the call is {call}") from None


def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return function(**arguments)
    except (Unsupported, Refused, Accident, KeyboardInterrupt):
        raise
    except NotImplementedError as error:
        raise Unsupported(describe(error)) from error
    except BaseException as error:  # other libraries refuse with any exception
        names = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, ACCIDENTS) or "OutOfMemoryError" in names:
            raise Accident(describe(error)) from error
        raise Refused(describe(error)) from error


def _outputs(operation: str, returned: Any) -> Tensors:
    names = OPERATIONS[operation].outputs
    values = returned if isinstance(returned, tuple) else (returned,)
    if len(values) != len(names):
        signature = OPERATIONS[operation].signature(operation)
        raise Accident(f"returned {len(values)} values; the call is {signature}")
    return {n: _output(n, v) for n, v in zip(names, values, strict=True)}


def _output(name: str, value: Any) -> Tensor:
    try:
        array = np.asarray(value)
    except Exception as error:
        raise Accident(f"{name} is no array: {describe(error)}") from error
    if array.dtype.name not in ITEMSIZE:
        choices = ", ".join(ITEMSIZE)
        raise Accident(f"{name} has dtype {array.dtype}; the vectors use {choices}")
    if array.nbytes > LARGEST:
        raise Accident(f"{name} has shape {array.shape}: {array.nbytes} bytes")
    return Tensor.from_array(array)


def _check_unchanged(arrays: Mapping[str, Array], inputs: Tensors) -> None:
    for name, array in arrays.items():
        if Tensor.from_array(array) != inputs[name]:
            raise Accident(f"overwrote its argument {name}")
