"""The checker of annotations: jaxtyping and beartype, once for calls that are alike.

The verdict of both depends on the types of the arguments and of the result, and on the
dtype and shape of each array. So a call that is like one that passed is not checked
again: the laws call small functions so often that the checks took ten times as long as
the functions.

`install` replaces `jaxtyping.jaxtyped`, which the import hook of jaxtyping writes
before every function. The checker accepts int for float.
"""

import functools
import threading
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
# Types whose values are all alike; by whether the annotations tell texts apart.
PLAIN: dict[bool, set[type]] = {False: set(), True: set()}


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
        PLAIN[literal].add(kind)
        return kind
    if what == "shape":
        return kind, value.dtype, value.shape
    if what in ("literal", "value"):
        return value
    if what == "all" or len(value) > LONGEST or depth > DEEPEST:
        raise UnlikeError
    items = value.items() if isinstance(value, dict) else value
    plain = PLAIN[literal]  # most values, without a call for each
    return kind, *[
        type(item) if type(item) in plain else likeness(item, literal, depth + 1)
        for item in items
    ]


def alike(literal: bool, values: Any, named: Any = None) -> Any:
    """Return the likeness of all values, or None if one has none."""
    try:
        found = likeness(values, literal)
        if named:
            found = found, likeness(named, literal)
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


class Running(threading.local):
    """The functions that stand-ins call next, of each thread."""

    def __init__(self) -> None:
        self.next: list[Callable[..., Any]] = []


def stand_in(function: Callable[..., Any], running: Running) -> Callable[..., Any]:
    """Return a function with the same annotations that calls the next of `running`."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return running.next.pop()(*args, **kwargs)

    within = function.__globals__  # annotations in strings are resolved here
    other = types.FunctionType(
        called.__code__, within, function.__name__, None, called.__closure__
    )
    return functools.update_wrapper(other, function)


class Judged:
    """The likenesses of calls that passed, each with those of its results, and others.

    The message of a refusal takes 5 ms to write, so it is written once.
    """

    def __init__(self) -> None:
        self.known: dict[Any, set[Any] | str] = {}

    def results(self, call: Any) -> set[Any] | None:
        """Return the likenesses of the call's results, or refuse it as before."""
        known = self.known.get(call)
        if isinstance(known, str):
            raise jaxtyping.TypeCheckError(known)
        return known

    def passes(self, call: Any, result: Any) -> None:
        if None not in (call, result):
            known = self._remembered(call, set())
            assert isinstance(known, set)
            known.add(result)

    def refuses(self, call: Any, error: Exception) -> None:
        if call is not None and own(error):
            self._remembered(call, str(error))

    def _remembered(self, call: Any, verdict: set[Any] | str) -> set[Any] | str:
        if len(self.known) == REMEMBERED and call not in self.known:
            self.known.clear()
        return self.known.setdefault(call, verdict)


def own(error: Exception) -> bool:
    """Return whether the checks of this call's own parameters raised the error."""
    trace, inside = error.__traceback__, []
    while trace:
        inside.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    here = "wrapped_fn_impl"  # of jaxtyping; the function that it calls may have others
    mine = inside.count(here) == 1 and inside[-1] == here
    return mine and str(error).startswith("Type-check error whilst checking the param")


class Checker:
    """The checks of a function and of all functions that one `def` makes.

    The library takes a millisecond to write the checks, so a function inside another is
    not given new ones each time that the other runs.
    """

    def __init__(self, function: Callable[..., Any], typechecker: Any) -> None:
        self.running = Running()
        self.judged = Judged()
        parameters = signature(function).parameters.values()
        free = {p.name for p in parameters if p.annotation is Parameter.empty}
        self.first = int(next((p.name in free for p in parameters), False))  # `self`
        self._of = stand_in(function, self.running), typechecker

    @functools.cached_property
    def literal(self) -> bool:
        return has_literals(self._of[0])

    @functools.cached_property
    def _strict(self) -> Callable[..., Any]:  # many functions are never called
        function, typechecker = self._of
        return jaxtyped(function, typechecker=typechecker)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the function between the library's checks of parameters and result."""
        waiting = self.running.next
        before = len(waiting)
        waiting.append(function)
        try:
            return self._strict(*args, **kwargs)
        finally:
            del waiting[before:]  # refused before the call


@functools.cache
def _checker(code: Any, typechecker: Any, *told: Any) -> list[Checker]:
    return []


def checker_of(function: Callable[..., Any], typechecker: Any) -> Checker:
    """Return the checker of all functions with this code, annotations and defaults."""
    told = (*function.__annotations__.items(), function.__defaults__)
    more = (function.__kwdefaults__ or {}).items()
    try:
        known = _checker(function.__code__, typechecker, *told, *more)
    except TypeError:  # an annotation or a default has no hash
        known = []
    if not known:
        known.append(Checker(function, typechecker))
    return known[0]


def once(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    """Return the function with checks that skip calls like one that was checked."""
    checker = checker_of(function, typechecker)
    judged, first = checker.judged, checker.first

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        call = alike(checker.literal, args[first:], kwargs)
        known = judged.results(call)
        try:
            if known:
                result = function(*args, **kwargs)
            else:
                result = checker.call(function, args, kwargs)
        except jaxtyping.TypeCheckError as error:
            judged.refuses(call, error)
            raise
        like = alike(checker.literal, result)
        if known and like in known:
            return result
        if known:
            checker.call(lambda *_, **__: result, args, kwargs)
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
