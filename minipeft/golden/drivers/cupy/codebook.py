"""The codebooks of the CuPy column: constants of the host, which launches upload."""

from minipeft.cupy import codebook
from minipeft.cupy.codebook import FP4, NF4
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array

TABLES = {"nf4": NF4, "fp4": FP4}


def codebook_table(name: str) -> Array:
    """Return the values of a named data type."""
    if name not in TABLES:
        raise Unsupported(f"the CuPy column has no table {name}; pass it any codebook")
    return TABLES[name]


def codebook_dynamic_map(signed: bool) -> Array:
    """Return the 256 values."""
    return codebook.dynamic_map(signed)
