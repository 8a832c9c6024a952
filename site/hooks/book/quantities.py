"""What chapters print below a label: one label has one value in the whole book."""

from collections.abc import Mapping

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
            where, known = first.setdefault(label, (chapter, value))
            if known != value:
                raise BookError(
                    f"{label!r} is {known} in {where} and {value} in {chapter}: "
                    "compute one value, or name each setting in its label"
                )
