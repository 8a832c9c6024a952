"""What chapters print below a label: one label has one value in the whole book."""

from collections.abc import Iterator, Mapping

from . import BookError
from .run import Result


def check(results: Mapping[str, Result]) -> None:
    """Compare every labelled number of every chapter.

    Raises:
        BookError: a label has two values; the sentence names the chapters and both.
    """
    first: dict[str, tuple[str, str]] = {}
    for chapter, result in results.items():
        for label, value in result.quantities:
            _compare(first, label, value, chapter)
    labels = first.keys()
    for chapter, result in results.items():
        for label, value in _lines(result):
            if label in labels:
                _compare(first, label, value, chapter)


def _compare(
    first: dict[str, tuple[str, str]], label: str, value: str, chapter: str
) -> None:
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
