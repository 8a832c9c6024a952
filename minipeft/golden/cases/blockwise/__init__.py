"""NF4 and FP4: quantize and dequantize in blocks."""

from collections.abc import Iterator

from minipeft.golden.cases import File
from minipeft.golden.cases.blockwise import dequantize, quantize


def files() -> Iterator[File]:
    """Yield the four files of the row."""
    yield quantize.nf4()
    yield quantize.fp4()
    yield dequantize.nf4()
    yield dequantize.fp4()
