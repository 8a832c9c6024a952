"""Checks of operands that are no arrays: whole numbers, numbers, flags, parts.

Each refuses in one sentence that names the operand, before anything is computed.
"""

from collections.abc import Callable
from fractions import Fraction
from math import inf, isfinite
from numbers import Integral, Real
from reprlib import repr as shortened
from typing import SupportsFloat

from minipeft.errors import InputError

__all__ = [
    "check_calls",
    "check_flag",
    "check_integer",
    "check_kind",
    "check_number",
    "check_sizes",
]

LARGEST = 2**63 - 1  # the last index of an array


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


def _said(value: object) -> str:
    plain = isinstance(value, Real | complex | str | bytes | None)
    return shortened(value) if plain else f"of type {type(value).__name__}"
