"""A tensor as dtype, shape and bytes, for files and for messages."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minipeft.errors import InputError
from minipeft.golden.errors import Unsupported

Array = NDArray[Any]

AXES = 64  # of an array of NumPy
LARGEST = 2**48  # values; NumPy also refuses an empty array with larger sizes

ITEMSIZE = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Tensor:
    """Bytes in C order, little-endian; they store every bit pattern exactly."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def from_json(cls, value: object) -> "Tensor":
        """Read `{"dtype": …, "shape": […], "data": "hex"}`; refuse anything else."""
        if not isinstance(value, Mapping) or set(value) != {"dtype", "shape", "data"}:
            raise InputError(
                f"{_short(value)} is no tensor; give dtype, shape and data."
            )
        tensor = cls(
            _dtype(value["dtype"]), _shape(value["shape"]), _bytes(value["data"])
        )
        tensor._check()
        return tensor

    def to_json(self) -> dict[str, object]:
        """Return the object that `from_json` reads."""
        shape = list(self.shape)
        return {"dtype": self.dtype, "shape": shape, "data": self.data.hex()}

    @classmethod
    def from_array(cls, array: object) -> "Tensor":
        """Convert an array of any memory order and byte order."""
        values = np.asarray(array, order="C")
        little = values.astype(values.dtype.newbyteorder("<"), copy=False)
        return cls(values.dtype.name, values.shape, little.tobytes())

    def to_array(self) -> Array:
        """Return a new, writable array."""
        dtype = numpy_dtype(self.dtype).newbyteorder("<")
        return np.frombuffer(bytearray(self.data), dtype).reshape(self.shape)

    def numbers(self) -> Array:
        """Return the values in float64, which holds each of them exactly."""
        if self.dtype == "bfloat16":  # bfloat16 is the upper half of a float32
            bits = np.frombuffer(self.data, "<u2").astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32).astype(np.float64).reshape(self.shape)
        return self.to_array().astype(np.float64)

    def bits(self) -> Array:
        """Return the bit pattern of every value as an unsigned integer."""
        code = f"<u{ITEMSIZE[self.dtype]}"
        return np.frombuffer(self.data, code).reshape(self.shape)

    def _check(self) -> None:
        expected = prod(self.shape) * ITEMSIZE[self.dtype]
        if len(self.data) != expected:
            raise InputError(
                f"a {self.dtype} tensor of shape {list(self.shape)} has {expected} "
                f"bytes, but data holds {len(self.data)}; give the hex of all values."
            )


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype; bfloat16 is the one that NumPy lacks."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise Unsupported(
            "bfloat16 arrays need the package ml_dtypes (pip install ml_dtypes)"
        ) from None
    return np.dtype(bfloat16)


def _dtype(value: object) -> str:
    if isinstance(value, str) and value in ITEMSIZE:
        return value
    choices = ", ".join(ITEMSIZE)
    raise InputError(f"dtype is {_short(value)}; choose one of {choices}.")


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
        raise InputError(
            f"shape is {_short(value)}; give a list of sizes, such as [4, 96]."
        )
    if len(value) > AXES or prod(max(n, 1) for n in value) > LARGEST:
        raise InputError(
            f"shape is {_short(value)}; no array is that large: give at most {AXES} "
            "axes."
        )
    return tuple(value)


def _bytes(value: object) -> bytes:
    try:
        return bytes.fromhex(value if isinstance(value, str) else "?")
    except ValueError:
        raise InputError(
            f"data is {_short(value)}; give two hexadecimal digits for every byte."
        ) from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
