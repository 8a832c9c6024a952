"""Codebooks in the torch column."""

from minipeft.golden.drivers.bridge import to_numpy
from minipeft.golden.tensors import Array
from minipeft.torch import codebook
from minipeft.torch.codebook import FP4, NF2, NF3, NF4

TABLES = {"nf4": NF4, "fp4": FP4, "nf3": NF3, "nf2": NF2}


def codebook_table(name: str) -> Array:
    """Return the values of a named data type."""
    return to_numpy(TABLES[name])


def codebook_normal_float(bits: int, offset: float) -> Array:
    """Return the quantiles."""
    return to_numpy(codebook.normal_float(bits, offset))


def codebook_dynamic_map(signed: bool) -> Array:
    """Return the 256 values."""
    return to_numpy(codebook.dynamic_map(signed))
