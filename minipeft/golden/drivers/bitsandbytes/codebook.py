"""Codebooks in bitsandbytes: `functional.get_4bit_type` and two constructions."""

import numpy as np
from bitsandbytes import functional

from minipeft.golden.drivers.bridge import to_numpy
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array


def codebook_table(name: str) -> Array:
    """Return the values of a named data type."""
    if name not in ("nf4", "fp4"):
        raise Unsupported(f"bitsandbytes has no {name}")
    return to_numpy(functional.get_4bit_type(name, device="cpu"))


def codebook_normal_float(bits: int, offset: float) -> Array:
    """Return the quantiles; it pads its own table with zeros to 256 values."""
    if bits != 4:
        raise Unsupported("bitsandbytes constructs 4 bits only")
    try:
        padded = to_numpy(functional.create_normal_map(offset))
    except ImportError:
        raise Unsupported("bitsandbytes needs scipy to construct NF4") from None
    negative, positive = padded[padded < 0], padded[padded > 0]
    return np.concatenate([negative, padded[padded == 0][:1], positive])


def codebook_dynamic_map(signed: bool) -> Array:
    """Return the 256 values."""
    return to_numpy(functional.create_dynamic_map(signed=signed))
