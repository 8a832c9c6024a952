"""Implementations with one bug each; every bug was found in some program.

A bug has a function that replaces an operation and a flag that must name it. If only a
few cases find the bug, it also lists their comments. There is one file for each row of
methods.
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
    """Register a function as the operation `operation` of a broken implementation."""

    def register(function: Function) -> Function:
        assert function.__name__ not in BUGS, "two bugs of one name"
        BUGS[function.__name__] = Bug(operation, function, flag, only)
        return function

    return register
