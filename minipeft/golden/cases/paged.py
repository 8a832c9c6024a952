"""Cases of paged_trace: which page is loaded, evicted and written back."""

from collections.abc import Iterator

import numpy as np

from minipeft.golden.cases import File, Spec
from minipeft.golden.cases.build import refused


def files() -> Iterator[File]:
    """Yield the file of the row."""
    yield File(
        operation="paged_trace",
        header=(
            "Pages 0 to pages - 1 are on the host. touched names a page; the device",
            "has it from then on, as the most recently used. written says whether it",
            "is then changed. faulted: it was not there; left: the page that made",
            "room, 255 for none; written_back: whether that one had been changed.",
            "resident: the pages on the device, the least recently used first.",
        ),
        source="minipeft.reference.paged",
        specs=[*_specs()],
    )


def _specs() -> Iterator[Spec]:
    yield _spec("three of three", "Fits", "0120120", "0000000", 3, 3)
    yield _spec("page 0 is used again", "LeastRecentlyUsed", "01020", "00000", 3, 2)
    yield _spec("four in three", "Loop LeastRecentlyUsed", "012301230", "0" * 9, 4, 3)
    yield _spec("two writes", "Dirty", "010231", "010010", 4, 2)
    yield _spec("written once, back once", "Dirty", "0121", "1000", 3, 1)
    yield _spec("one page", "OnePage Dirty", "00110220", "10110001", 3, 1)
    spec = _spec("a budget of 0", "OutOfRange", "0", "0", 1, 0)
    yield refused(spec, spec.comment, "OutOfRange")
    for page in "38":
        spec = _spec("", "", f"01{page}", "000", 3, 2)
        yield refused(spec, f"page {page} of 3", "OutOfRange")
    spec = _spec("", "", "012", "00", 3, 2)
    yield refused(spec, "written is one short", "ShapeMismatch")


def _spec(
    comment: str, flags: str, touched: str, written: str, pages: int, budget: int
) -> Spec:
    digits = {"touched": touched, "written": written}
    inputs = {k: np.array([int(c) for c in v], np.uint8) for k, v in digits.items()}
    parameters = {"pages": pages, "budget": budget}
    return Spec(comment, tuple(flags.split()), inputs, parameters)
