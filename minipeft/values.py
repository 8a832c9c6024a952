"""Checks of operands that are no arrays: whole numbers, numbers, flags, kinds.

Each refuses in one sentence that names the operand, before anything is computed.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, wraps
from inspect import signature
from math import inf, isfinite
from numbers import Integral, Real
from reprlib import repr as shortened
from types import UnionType
from typing import (
    Any,
    Literal,
    ParamSpec,
    SupportsFloat,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from minipeft.errors import InputError

__all__ = [
    "check_calls",
    "check_device",
    "check_flag",
    "check_integer",
    "check_kind",
    "check_number",
    "check_sizes",
    "checked",
]

Given = ParamSpec("Given")
Result = TypeVar("Result")

NUMBERS = {int: Integral, float: Real}  # NumPy's own too
LARGEST = 2**63 - 1  # the last index of an array


def check_device(device: str, others: Sequence[str], count: int, remedy: str) -> str:
    """Return the name of a device: one of the others, `cuda`, or `cuda:N`.

    Args:
        device: as a user wrote it.
        others: names without a number.
        count: of the CUDA devices that are here.
        remedy: what to do where there is none.

    Raises:
        InputError: for another name, or a device that is not here.
    """
    if device in others:
        return device
    kind, colon, number = device.partition(":")
    numbered = number.isascii() and number.isdecimal() and len(number) < 4
    if kind != "cuda" or (colon and not numbered):
        raise InputError(
            f"there is no device {shortened(device)}; choose {', '.join(others)}, cuda "
            "or, of several, cuda:N"
        )
    if not count:
        raise InputError(f"torch sees no CUDA device here; {remedy}")
    if colon and int(number) >= count:
        here = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise InputError(f"torch sees no {device} here; it sees {here}")
    return f"cuda:{int(number)}" if colon else device


def check_integer(
    name: str, value: int, least: float = -inf, most: int = LARGEST
) -> None:
    """Refuse what is no whole number, such as True, or out of range.

    Raises:
        InputError: names the operand, what it is, and what to choose.
    """
    whole = isinstance(value, int | Integral) and not isinstance(value, bool)
    if whole and least <= value <= most:
        return
    low = "a whole number" if least == -inf else f"{least} or more"
    wanted = low if most == LARGEST else f"{least} to {most}"
    if whole and value > LARGEST:
        wanted = "a number that fits an index"
    raise InputError(f"{name} is {_said(value)}; choose {wanted}.")


def check_number(name: str, value: SupportsFloat) -> None:
    """Refuse what is no real number, fractions, NaN, and infinity.

    NumPy would turn an array of floats times a `Fraction` into one of objects.

    Raises:
        InputError: names the operand, what it is, and what to choose.
    """
    try:
        if isinstance(value, float | int) and isfinite(value):
            return
    except OverflowError:  # a whole number beyond float64
        pass
    else:
        plain = isinstance(value, Real) and not isinstance(value, Fraction)
        if plain and isfinite(value):  # NumPy's own numbers
            return
    raise InputError(f"{name} is {_said(value)}; choose a finite number.")


def check_flag(name: str, value: bool) -> None:
    """Refuse what is neither True nor False: any text would count as True.

    Raises:
        InputError: names the operand and what it is.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is {_said(value)}; choose True or False.")


def check_kind(name: str, value: object, *kinds: type) -> None:
    """Refuse a value of another type.

    Raises:
        InputError: names the operand, its type, and the types that fit.
    """
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(
            f"{name} is of type {type(value).__name__}; give one of type {wanted}."
        )


def check_sizes(name: str, shape: tuple[int, ...], axes: int | None = None) -> None:
    """Refuse what is no shape: a tuple of whole numbers, 0 or more each.

    Raises:
        InputError: names the operand and what it is.
    """
    check_kind(name, shape, tuple, list)
    whole = all(isinstance(n, int | Integral) and n >= 0 for n in shape)
    if not whole or len(shape) != (len(shape) if axes is None else axes):
        count = "" if axes is None else f"{axes} "
        raise InputError(
            f"{name} is {shortened(tuple(shape))}; choose {count}lengths of 0 or more."
        )


def check_calls(name: str, value: Callable[..., object]) -> None:
    """Refuse what cannot be called.

    Raises:
        InputError: names the operand and its type.
    """
    if not callable(value):
        raise InputError(f"{name} is of type {type(value).__name__}; give a function.")


def checked(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function refuse arguments of other types than its annotations name.

    For functions that a reader calls from a notebook: one text where a list of texts is
    meant would be read letter by letter, and None ends in an AttributeError elsewhere.
    Which other texts, numbers and shapes fit is left to the function.
    """
    form, hints = signature(function), cache(lambda: get_type_hints(function))

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for name, value in form.bind(*args, **kwargs).arguments.items():
            hint = hints().get(name, Any)
            if not _fits(value, hint):
                wanted = hint.__name__ if isinstance(hint, type) else str(hint)
                wanted = re.sub(r"\b(\w+\.)+", "", wanted).replace("NoneType", "None")
                raise InputError(
                    f"{name} is {_said(value)}; give one of type {wanted}."
                )
        return function(*args, **kwargs)

    return call


def _fits(value: object, hint: Any) -> bool:
    hint = getattr(hint, "array_type", hint)  # of an annotation with a shape
    inner, kind = get_args(hint), get_origin(hint) or hint
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is Literal:
        return any(value is one or value == one for one in inner)
    if kind is Any or not isinstance(kind, type):
        return True
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
    if isinstance(value, str) and kind is not object:
        return kind is str
    if kind is tuple and isinstance(value, tuple | list) and ... not in inner:
        pairs = zip(value, inner, strict=False)
        return len(value) == len(inner) and all(_fits(*pair) for pair in pairs)
    return isinstance(value, kind) and _hold(value, inner)


def _hold(value: Any, inner: tuple[Any, ...]) -> bool:
    if not inner or not isinstance(value, list | tuple | dict):
        return True
    if isinstance(value, dict):
        keys, values = inner
        return all(_fits(k, keys) and _fits(v, values) for k, v in value.items())
    return all(_fits(one, inner[0]) for one in value)


def _said(value: object) -> str:
    plain = isinstance(value, Real | complex | str | bytes | None)
    return shortened(value) if plain else f"of type {type(value).__name__}"
