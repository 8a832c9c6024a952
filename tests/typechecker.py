"""What checks every annotation: jaxtyping and beartype, once for calls that are alike.

Their verdict depends on the types of the arguments and of the result, and on the dtype
and shape of each array. So what is like a call that has passed is not checked again:
the laws call small functions so often that the checks took ten times as long as they.

`install` puts this in the place of `jaxtyping.jaxtyped`, which the import hook of
jaxtyping writes before every function. It accepts int for float.
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
REMEMBERED = 4096  # calls of one function
LONGEST = 32  # containers with more items are looked at each time


class UnlikeError(Exception):
    """A container whose contents would have to be looked at."""


@functools.cache
def looked_at(kind: type) -> str:
    """Return what an annotation can ask of a value of this type."""
    if kind in (str, bool, type):
        return "value"  # of a literal; of a class, which it is
    if hasattr(kind, "shape") and hasattr(kind, "dtype"):
        # A subclass may compute what it answers, by functions that are checked as well.
        return "shape" if kind.__module__.split(".")[0] in LIBRARIES else "all"
    if issubclass(kind, tuple | list | dict):
        return "items"
    return "all" if hasattr(kind, "__iter__") else "type"


def likeness(value: Any) -> Any:
    """Return the same for two values that an annotation cannot tell apart."""
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
    """Return the likeness of all, or None if there is none."""
    try:
        found = likeness(values)
        hash(found)
    except Exception:  # also what a property raises
        return None
    return found


def replaying(function: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """Return a function with the same annotations that gives back the last result."""

    def replay(*args: Any, **kwargs: Any) -> Any:
        return results.pop()

    within = function.__globals__  # where annotations that are strings are looked up
    again = types.FunctionType(
        replay.__code__, within, function.__name__, None, replay.__closure__
    )
    return functools.update_wrapper(again, function)


class Passed(dict[Any, set[Any]]):
    """The likeness of calls that have passed, each with those of its results."""

    def add(self, call: Any, result: Any) -> None:
        if None not in (call, result):
            if len(self) == REMEMBERED:
                self.clear()
            self.setdefault(call, set()).add(result)


def once(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    """Return the function with its checks, which leave out what is like a past call."""
    results: list[Any] = []

    @functools.cache  # many functions are imported and not called
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
