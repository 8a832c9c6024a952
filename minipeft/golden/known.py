"""Known failures: a text file in the repository of the verified implementation.

One case on a line, `nf4_quantize:26`; a `#` starts a comment.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from minipeft.errors import InputError
from minipeft.golden.runner import Outcome
from minipeft.golden.vectors import VectorFile

Known = frozenset[str]

HEAD = "# Cases that fail as of now: minipeft verify --known-failures FILE\n"


def name(outcome: Outcome) -> str:
    """Return the name of the case in such a file."""
    return f"{outcome.case.operation}:{outcome.case.tcId}"


def read(path: Path, files: Iterable[VectorFile]) -> Known:
    """Return the names of the cases in the file.

    Args:
        path: the text file.
        files: all vectors, to find mistyped names.

    Raises:
        InputError: if the file cannot be read, or a line names no case.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}.") from None
    cases = {f"{case.operation}:{case.tcId}" for file in files for case in file.cases}
    named = [line.partition("#")[0].strip() for line in lines]
    for number, word in enumerate(named, start=1):
        if word and word not in cases:
            raise InputError(
                f"{path}, line {number}: {word!r} is no case; write operation:tcId."
            )
    return frozenset(word for word in named if word)


def write(
    outcomes: Iterable[Outcome], listed: Known, files: Iterable[VectorFile]
) -> str:
    """Return the text of a file that lists the failures.

    Args:
        outcomes: of the cases that were asked now.
        listed: what the file lists so far; it stays listed where nobody asked now.
        files: all vectors, for the order and the comments.
    """
    failed = {name(o) for o in outcomes if o.status in ("fail", "known")}
    asked = {name(o) for o in outcomes if o.status != "skip" or o.answered}
    kept = failed | (listed - asked)
    cases = [(f"{c.operation}:{c.tcId}", c.comment) for f in files for c in f.cases]
    return HEAD + "".join(f"{n}  # {why}\n" for n, why in cases if n in kept)


def excuse(known: Known, outcome: Outcome) -> Outcome:
    """Mark a listed failure as known, so that it does not fail the run."""
    if outcome.status == "fail" and name(outcome) in known:
        return replace(outcome, status="known")
    return outcome


def mended(known: Known, outcomes: Sequence[Outcome]) -> list[str]:
    """Return the listed cases that pass now."""
    return [name(o) for o in outcomes if o.status == "pass" and name(o) in known]
