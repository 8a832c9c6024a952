"""Implementations as plain functions: our columns, and peers under their own rules.

One package for each implementation, one file for each row of methods. A missing file or
function is a listed skip. A package that cannot run here raises `Unavailable` on
import.
"""

from importlib.util import find_spec

from minipeft.golden.errors import Unavailable


def need(package: str, install: str) -> None:
    """Say in one sentence that a package is missing, and how to get it."""
    if find_spec(package) is None:
        raise Unavailable(f"{package} is not installed; run: pip install {install}")
