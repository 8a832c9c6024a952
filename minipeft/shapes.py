"""Shapes of arrays: annotations for readers and tests, and a check for every user.

`Float[np.ndarray, "r in_features"]` names the axes with the words of the notation
page. Tests check the annotations with jaxtyping; without it they cost nothing.
`check_shapes` always runs: it refuses what NumPy and torch would broadcast.
"""

from collections.abc import Mapping
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

from minipeft.errors import InputError
from minipeft.values import check_kind, check_number

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Inexact as Inexact
    from jaxtyping import Integer as Integer
    from jaxtyping import Shaped as Shaped
    from jaxtyping import UInt8 as UInt8
else:
    try:
        from jaxtyping import Bool, Float, Inexact, Integer, Shaped, UInt8
    except ImportError:

        class _Unchecked:
            """An annotation without a check: `X[array, shape]` is `array`."""

            def __class_getitem__(cls, item):
                """Return the array type and forget the shape."""
                return item[0]

        Bool = Float = Inexact = Integer = Shaped = UInt8 = _Unchecked

__all__ = [
    "Bool",
    "Float",
    "Inexact",
    "Integer",
    "Shaped",
    "UInt8",
    "check_array",
    "check_dtype",
    "check_floats",
    "check_scaling",
    "check_shapes",
]

# An object array holds fractions, for proofs without rounding.
FLOATS = ("float16", "bfloat16", "float32", "float64", "object")


@runtime_checkable
class Operand(Protocol):
    """An array of any library."""

    @property
    def shape(self) -> Any:
        """The lengths of the axes."""

    @property
    def dtype(self) -> Any:
        """The type of a number."""


def check_floats(name: str, array: Operand) -> None:
    """Refuse numbers that are no floats: products of others overflow or mean nothing.

    Raises:
        InputError: if it is no array, or its dtype is complex, boolean or an integer.
    """
    check_array(name, array, "floats")
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        raise InputError(f"{name} has dtype {dtype}; convert it to a float dtype.")
    if dtype == "object":
        values: Any = array  # NumPy's: torch has no arrays of objects
        odd = next((v for v in values.flat if not isinstance(v, Real)), 0)
        check_kind(f"a value of {name}", odd, Real)


def check_dtype(dtype: DTypeLike) -> None:
    """Refuse what is no float dtype of NumPy for a result.

    Raises:
        InputError: names it and what to choose.
    """
    try:
        # None would mean float64.
        found = None if dtype is None else np.dtype(dtype)
    except TypeError:
        found = None
    if found is None:
        raise InputError(f"dtype is {dtype!r}; choose a float dtype, such as float32.")
    check_floats("the result", np.empty(0, found))


def check_scaling(scaling: Any, beside: Operand) -> None:
    """Refuse a scaling that is no finite number, or a fraction beside floats.

    Raises:
        InputError: names it and what to choose.
    """
    if not (isinstance(scaling, Fraction) and str(beside.dtype) == "object"):
        check_number("scaling", scaling)


def check_array(name: str, array: Operand, of: str) -> None:
    """Refuse what is no array.

    Raises:
        InputError: names the operand, its type, and the numbers it should hold.
    """
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        kind = type(array).__name__
        raise InputError(f"{name} is of type {kind}; give an array of {of}.")


def check_shapes(operands: Mapping[str, tuple[Operand | None, str]]) -> None:
    """Refuse an operand whose shape contradicts those before it.

    `{"W": (W, "out_features in_features"), "bias": (bias, "out_features")}` asks for a
    bias of W's first length. A first word `...` stands for any leading axes, the same
    for all operands. A first word `?` lets an operand be None: it is left out.

    Args:
        operands: each by name, with the names of its axes.

    Raises:
        InputError: at the first that is no array, or has a wrong shape or no floats.
    """
    lengths: dict[str, tuple[int, ...]] = {}
    seen: list[str] = []
    for name, (array, axes) in operands.items():
        words = axes.split()
        if words[0] == "?":
            if array is None:
                continue
            words = words[1:]
        operand = cast("Operand", array)
        check_floats(name, operand)
        shape = tuple(operand.shape)
        parts = _parts(shape, words)
        if parts is None or any(lengths.get(w, p) != p for w, p in parts.items()):
            beside = f" beside {' and '.join(seen)}" if seen else ""
            raise InputError(
                f"{name} has shape {shape}; it must be {_wanted(words, lengths)}"
                f"{beside}."
            )
        lengths |= parts
        seen.append(f"{name} of shape {shape}")


def _parts(
    shape: tuple[int, ...], words: list[str]
) -> dict[str, tuple[int, ...]] | None:
    """Return the lengths by name, or None if there are too few or too many axes."""
    extra = len(shape) - len(words)
    if words[0] == "...":
        lead, rest = shape[: extra + 1], shape[extra + 1 :]
        if extra < -1:
            return None
        return {"...": lead} | {
            word: (n,) for word, n in zip(words[1:], rest, strict=True)
        }
    return None if extra else {w: (n,) for w, n in zip(words, shape, strict=True)}


def _wanted(words: list[str], lengths: Mapping[str, tuple[int, ...]]) -> str:
    """Write a shape with the lengths that are known and the names of the others."""
    sizes = [str(n) for word in words for n in lengths.get(word, (word,))]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
