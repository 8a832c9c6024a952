"""Implementations with one bug each: every one of them has been somebody's.

A bug is a function in place of an operation, the flag that must name it, and, where few
cases alone find it, their comments. One file for each row of methods.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

Function = Callable[..., Any]


class Bug(NamedTuple):
    operation: str
    function: Function
    flag: str
    only: tuple[str, ...]


BUGS: dict[str, Bug] = {}


def bug(operation: str, flag: str, *only: str) -> Callable[[Function], Function]:
    """Register a function as what `operation` does in a broken implementation."""

    def register(function: Function) -> Function:
        assert function.__name__ not in BUGS, "two bugs of one name"
        BUGS[function.__name__] = Bug(operation, function, flag, only)
        return function

    return register
