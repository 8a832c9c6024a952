"""Wrong implementations from real programs; `museum.toml` names them."""

import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

from minipeft.golden.implementations import Functions
from minipeft.golden.runner import Outcome, verify
from minipeft.golden.vectors import VectorFile, load_all
from tests.impls import broken
from tests.impls.broken import BUGS

ROWS = [module.name for module in iter_modules(broken.__path__)]
for row in ROWS:
    import_module(f"tests.impls.broken.{row}")


class Exhibit(NamedTuple):
    """A bug of a library, its reports, and a vector with its flag that finds it."""

    name: str
    library: str
    story: str
    links: tuple[str, ...]
    flag: str
    vector: str


@cache
def file_of(operation: str) -> VectorFile:
    (file,) = load_all([operation])
    return file


@cache
def failures(name: str) -> list[Outcome]:
    """Return the failed cases of a wrong implementation."""
    bug = BUGS[name]
    wrong = Functions(name, {bug.operation: bug.function}.get)
    outcomes = verify(wrong, [file_of(bug.operation)])
    return [o for o in outcomes if o.status in ("fail", "policy")]


def exhibits() -> list[Exhibit]:
    """Return all exhibits, in their order."""
    text = Path(__file__).with_suffix(".toml").read_text("utf-8")
    return [_exhibit(name, **entry) for name, entry in tomllib.loads(text).items()]


def _exhibit(name: str, library: str, story: str, links: list[str]) -> Exhibit:
    operation, _, flag, _ = BUGS[name]
    found = next(o.case for o in failures(name) if flag in o.case.flags)
    vector = f"{operation}:{found.tcId}"
    return Exhibit(name, library, story, tuple(links), flag, vector)
