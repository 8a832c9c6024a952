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
from typing import (
    Annotated,
    Any,
    ForwardRef,
    Literal,
    NewType,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
jaxtyped = jaxtyping.jaxtyped  # the library's own

LIBRARIES = ("numpy", "torch")
REMEMBERED = 4096  # remembered calls of one function
LONGEST = 32  # longer containers are checked each time
DEEPEST = 3  # and so are containers in so many others


class UnlikeError(Exception):
    """A container whose contents must be checked each time."""


@functools.cache
def looked_at(kind: type) -> str:
    """Return the part of a value of this type that an annotation can test."""
    if kind is type:
        return "value"
    if kind in (str, bool):
        return "literal"
    if hasattr(kind, "shape") and hasattr(kind, "dtype"):
        # A subclass may compute what it answers, by functions that are checked as well.
        return "shape" if kind.__module__.split(".")[0] in LIBRARIES else "all"
    if issubclass(kind, tuple | list | dict):
        return "items"
    return "all" if hasattr(kind, "__iter__") else "type"


def likeness(value: Any, literal: bool = True, depth: int = 0) -> Any:
    """Return equal results for values that no annotation can tell apart.

    Args:
        value: of an argument, or a result.
        literal: whether the annotations tell texts and truth values apart.
        depth: how many containers it is in.
    """
    kind = type(value)
    what = looked_at(kind)
    if what == "type" or (what == "literal" and not literal):
        return kind
    if what == "shape":
        return kind, value.dtype, value.shape
    if what in ("literal", "value"):
        return value
    if what == "all" or len(value) > LONGEST or depth > DEEPEST:
        raise UnlikeError
    items = value.items() if isinstance(value, dict) else value
    return kind, *[likeness(item, literal, depth + 1) for item in items]


def alike(literal: bool, *values: Any) -> Any:
    """Return the likeness of all values, or None if one has none."""
    try:
        found = likeness(values, literal)
        hash(found)
    except Exception:  # also errors of a property
        return None
    return found


def tells_values_apart(hint: Any) -> bool:
    """Return whether an annotation allows some texts only, as a literal does."""
    if isinstance(hint, list | tuple):
        return any(map(tells_values_apart, hint))
    if isinstance(hint, TypeVar):
        return tells_values_apart((hint.__bound__, *hint.__constraints__))
    if get_origin(hint) in (Literal, Annotated) or is_typeddict(hint):
        return True
    if isinstance(hint, str | ForwardRef | NewType):
        return True  # what it means is not known here
    return tells_values_apart(get_args(hint))


def has_literals(function: Callable[..., Any]) -> bool:
    """Return whether an annotation of the function tells texts apart, or may do so."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # a name that only a type checker knows
        return True
    return tells_values_apart([*hints.values()])


def replaying(function: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """Return a function with the same annotations that returns the last result."""

    def replay(*args: Any, **kwargs: Any) -> Any:
        return results.pop()

    within = function.__globals__  # annotations in strings are resolved here
    again = types.FunctionType(
        replay.__code__, within, function.__name__, None, replay.__closure__
    )
    return functools.update_wrapper(again, function)


class Judged:
    """The likenesses of calls that passed, each with those of its results, and others.

    The message of a refusal takes 5 ms to write, so it is written once.
    """

    def __init__(self) -> None:
        self.passed: dict[Any, set[Any]] = {}
        self.refused: dict[Any, str] = {}

    def results(self, call: Any) -> set[Any] | None:
        """Return the likenesses of the call's results, or refuse it as before."""
        if call in self.refused:
            raise jaxtyping.TypeCheckError(self.refused[call])
        return self.passed.get(call)

    def passes(self, call: Any, result: Any) -> None:
        if None not in (call, result):
            if len(self.passed) == REMEMBERED:
                self.passed.clear()
            self.passed.setdefault(call, set()).add(result)

    def refuses(self, call: Any, error: Exception) -> None:
        if call is not None and own(error) and len(self.refused) < REMEMBERED:
            self.refused[call] = str(error)


def own(error: Exception) -> bool:
    """Return whether the checks of this call's own parameters raised the error."""
    trace, inside = error.__traceback__, []
    while trace:
        inside.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    here = "wrapped_fn_impl"  # of jaxtyping; the function that it calls may have others
    mine = inside.count(here) == 1 and inside[-1] == here
    return mine and str(error).startswith("Type-check error whilst checking the param")


def once(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    """Return the function with checks that skip calls like one that was checked."""
    results: list[Any] = []

    @functools.cache  # many functions are imported but never called
    def strict(again: bool = False) -> Callable[..., Any]:
        what = replaying(function, results) if again else function
        return jaxtyped(what, typechecker=typechecker)

    parameters = signature(function).parameters.values()
    free = {p.name for p in parameters if p.annotation is Parameter.empty}
    first = int(next((p.name in free for p in parameters), False))  # often `self`
    literal = functools.cache(functools.partial(has_literals, function))
    judged = Judged()

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        call = alike(literal(), args[first:], kwargs)
        known = judged.results(call)
        try:
            result = (function if known else strict())(*args, **kwargs)
        except jaxtyping.TypeCheckError as error:
            judged.refuses(call, error)
            raise
        like = alike(literal(), result)
        if known and like in known:
            return result
        if known:
            results.append(result)
            strict(again=True)(*args, **kwargs)
        judged.passes(call, like)
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
