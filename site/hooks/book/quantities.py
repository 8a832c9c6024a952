"""What chapters print below a label: one label has one value in the whole book."""

import re
from collections.abc import Iterator, Mapping

from . import BookError
from .run import Result

NUMBER = re.compile(r"[-+]?\d")
SPOKEN = frozenset(
    {"claim", "control"}
)  # sentences of a claim, which may begin with one

Known = dict[str, tuple[str, str]]
"""Where a label was first printed, and its value: {label: (chapter, value)}."""


def check(results: Mapping[str, Result]) -> None:
    """Compare every labelled number of every chapter.

    A registered quantity has one value everywhere. Any other line `label: number` has
    one value in all chapters that print it; within a chapter it may change, as the
    lines of a loop do.

    Raises:
        BookError: a label has two values; the sentence names the chapters and both.
    """
    registered: Known = {}
    for chapter, result in results.items():
        for label, value in result.quantities:
            _compare(registered, label, value, chapter)
    printed: Known = {}
    for chapter, result in results.items():
        for label, value in _lines(result):
            if label in registered:
                _compare(registered, label, value, chapter)
            elif NUMBER.match(value) and label not in SPOKEN:
                where, _ = printed.setdefault(label, (chapter, value))
                if where != chapter:
                    _compare(printed, label, value, chapter)


def check_readme(text: str, chapter: str, result: Result) -> None:
    """Look for each number below the README's figure in what a chapter registers.

    Args:
        text: README.md; without a figure there is nothing to look for.
        chapter: whose figure it is.
        result: of that chapter.

    Raises:
        BookError: a number is not one of its quantities, rounded.
    """
    figure = re.search(r"<picture>.*?</picture>\s*\*.*?\*\n\n", text, re.S)
    told = re.findall(r"\d+\.\d+|\d+(?= %)", figure[0]) if figure else []
    values = [
        float(value.split()[0].replace(",", "")) for _, value in result.quantities
    ]
    for number in told:
        digits = len(number.partition(".")[2])
        if number not in {f"{value:.{digits}f}" for value in values}:
            raise BookError(
                f"README.md says {number} of its figure, and {chapter} has no such "
                "quantity: write what the chapter prints"
            )


def _compare(first: Known, label: str, value: str, chapter: str) -> None:
    where, known = first.setdefault(label, (chapter, value))
    if known != value:
        raise BookError(
            f"{label!r} is {known} in {where} and {value} in {chapter}: "
            "compute one value, or name each setting in its label"
        )


def _lines(result: Result) -> Iterator[tuple[str, str]]:
    """Yield the label and the value of each printed line that may have both."""
    for output in (*result.cells, *result.solutions):
        for line in output["stdout"].splitlines():
            label, colon, value = line.strip().rpartition(": ")
            if colon:
                yield label, value
