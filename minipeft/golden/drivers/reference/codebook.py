"""Codebooks in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import codebook
from minipeft.reference.codebook import FP4, NF2, NF3, NF4

TABLES = {"nf4": NF4, "fp4": FP4, "nf3": NF3, "nf2": NF2}


def codebook_table(name: str) -> Array:
    """Return the values of a named data type."""
    return TABLES[name]


def codebook_normal_float(bits: int, offset: float) -> Array:
    """Return the quantiles."""
    return codebook.normal_float(bits, offset)


def codebook_dynamic_map(signed: bool) -> Array:
    """Return the 256 values."""
    return codebook.dynamic_map(signed)
