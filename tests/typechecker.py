"""The checker of annotations: jaxtyping and beartype, once for calls that are alike.

The verdict of both depends on the types of the arguments and of the result, and on the
dtype and shape of each array. So a call that is like one that passed is not checked
again: the laws call small functions so often that the checks took ten times as long as
the functions.

`install` replaces `jaxtyping.jaxtyped`, which the import hook of jaxtyping writes
before every function. The checker accepts int for float.
"""

import functools
import types
from collections.abc import Callable
from inspect import Parameter, isfunction, signature
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyped = jaxtyping.jaxtyped  # the library's own

LIBRARIES = ("numpy", "torch")
REMEMBERED = 4096  # remembered calls of one function
LONGEST = 32  # longer containers are checked each time


class UnlikeError(Exception):
    """A container whose contents must be checked each time."""


@functools.cache
def looked_at(kind: type) -> str:
    """Return the part of a value of this type that an annotation can test."""
    if kind in (str, bool, type):
        return "value"  # a literal; a class as a value
    if hasattr(kind, "shape") and hasattr(kind, "dtype"):
        # A subclass may compute what it answers, by functions that are checked as well.
        return "shape" if kind.__module__.split(".")[0] in LIBRARIES else "all"
    if issubclass(kind, tuple | list | dict):
        return "items"
    return "all" if hasattr(kind, "__iter__") else "type"


def likeness(value: Any) -> Any:
    """Return equal results for values that no annotation can tell apart."""
    kind = type(value)
    what = looked_at(kind)
    if what == "type":
        return kind
    if what == "shape":
        return kind, value.dtype, value.shape
    if what == "value":
        return value
    if what == "all" or len(value) > LONGEST:
        raise UnlikeError
    items = value.items() if isinstance(value, dict) else value
    return kind, *map(likeness, items)


def alike(*values: Any) -> Any:
    """Return the likeness of all values, or None if one has none."""
    try:
        found = likeness(values)
        hash(found)
    except Exception:  # also errors of a property
        return None
    return found


def replaying(function: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """Return a function with the same annotations that returns the last result."""

    def replay(*args: Any, **kwargs: Any) -> Any:
        return results.pop()

    within = function.__globals__  # annotations in strings are resolved here
    again = types.FunctionType(
        replay.__code__, within, function.__name__, None, replay.__closure__
    )
    return functools.update_wrapper(again, function)


class Passed(dict[Any, set[Any]]):
    """The likenesses of calls that passed, each with those of its results."""

    def add(self, call: Any, result: Any) -> None:
        if None not in (call, result):
            if len(self) == REMEMBERED:
                self.clear()
            self.setdefault(call, set()).add(result)


def once(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    """Return the function with checks that skip calls like one that passed."""
    results: list[Any] = []

    @functools.cache  # many functions are imported but never called
    def strict(again: bool = False) -> Callable[..., Any]:
        what = replaying(function, results) if again else function
        return jaxtyped(what, typechecker=typechecker)

    parameters = signature(function).parameters.values()
    free = {p.name for p in parameters if p.annotation is Parameter.empty}
    first = int(next((p.name in free for p in parameters), False))  # often `self`
    passed = Passed()

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        call = alike(args[first:], kwargs)
        known = passed.get(call)
        result = (function if known else strict())(*args, **kwargs)
        like = alike(result)
        if known and like in known:
            return result
        if known:
            results.append(result)
            strict(again=True)(*args, **kwargs)
        passed.add(call, like)
        return result

    return checked


def install() -> None:
    """Let the import hook of jaxtyping write `once` before functions."""

    def decorate(decorated: Any = None, *, typechecker: Any = None) -> Any:
        if decorated is None:
            return functools.partial(decorate, typechecker=typechecker)
        how = once if isfunction(decorated) else jaxtyped
        return how(decorated, typechecker=typechecker)

    jaxtyping.jaxtyped = decorate
