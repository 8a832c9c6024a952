"""The values of PTX instructions, as NumPy functions on arrays of lanes."""

from collections.abc import Callable

import ml_dtypes
import numpy as np

Modifiers = tuple[str, ...]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class UnsupportedError(Exception):
    """A PTX instruction that this interpreter does not know."""


def numpy_type(kind: str) -> np.dtype:
    """Return the NumPy dtype of a PTX type; untyped bits are unsigned."""
    if kind == "pred":
        return np.dtype(bool)
    if kind in ("bf16", "bf16x2", "f16x2"):
        return BFLOAT16 if kind == "bf16" else np.dtype(np.uint32)
    letter = {"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]]
    return np.dtype(f"{letter}{int(kind[1:]) // 8}")


def canonical(values: np.ndarray) -> np.ndarray:
    """Replace every NaN by the NaN that CUDA's conversions give: 0x7fff."""
    nan = np.isnan(values.astype(np.float32))
    bits = np.where(nan, np.uint16(0x7FFF), values.view(np.uint16))
    return bits.view(values.dtype)


def narrow(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round float32 to a 16-bit type, to nearest, ties to even."""
    return canonical(values.astype(dtype))


# Comparisons --------------------------------------------------------------------------

ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def compare(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compare as `setp` does; comparisons whose names end in u are true for NaN."""
    if a.dtype.kind != "f":
        return ORDERED[name](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if name in ("nan", "num"):
        return nan if name == "nan" else ~nan
    if name.endswith("u"):
        return ORDERED[name[:-1]](a, b) | nan
    return ORDERED[name](a, b) & ~nan


# Conversions --------------------------------------------------------------------------

TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def convert(modifiers: Modifiers, *sources: np.ndarray) -> np.ndarray:
    """Convert as `cvt` does: [rounding, …] to, from."""
    to, source = modifiers[-2], sources[0]
    if to in ("f16x2", "bf16x2"):  # the first operand goes into the high half
        half = np.dtype(np.float16) if to == "f16x2" else BFLOAT16
        high, low = (narrow(s, half).view(np.uint16) for s in sources)
        return high.astype(np.uint32) << np.uint32(16) | low
    target = numpy_type(to)
    if source.dtype.kind == "f" and target.kind in "iu":
        rounded = TO_INTEGER[next(m for m in modifiers if m in TO_INTEGER)](source)
        limits = np.iinfo(target)
        rounded = np.where(np.isnan(rounded), 0, rounded).astype(np.float64)
        return np.clip(rounded, limits.min, limits.max).astype(target)
    if source.dtype == np.float32 and to in ("f16", "bf16"):
        return narrow(source, target)
    return source.astype(target)


# Arithmetic ---------------------------------------------------------------------------


def exact_only(modifiers: Modifiers) -> None:
    """Refuse approximations: their bits differ between GPUs."""
    wrong = {"approx", "full", "ftz"} & set(modifiers)
    if wrong:
        raise UnsupportedError(f".{wrong.pop()} has no defined bits")


def floats(operation: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Make an instruction from a NumPy function that rounds once."""

    def apply(modifiers: Modifiers, *sources: np.ndarray) -> np.ndarray:
        exact_only(modifiers)
        return operation(*sources)

    return apply


def fma(modifiers: Modifiers, a: np.ndarray, b: np.ndarray, c: np.ndarray):
    """Fused multiply-add in float32: one rounding of the exact a * b + c.

    In float64 the product is exact. The sum is rounded to odd, so that the second
    rounding, to float32, is correct.
    """
    exact_only(modifiers)
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    odd = total.view(np.int64) & 1
    toward = np.where(error > 0, np.inf, -np.inf)
    inexact = (error != 0) & np.isfinite(error) & (odd == 0)
    total = np.where(inexact, np.nextafter(total, toward), total)
    return total.astype(np.float32)


def multiply(modifiers: Modifiers, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        exact_only(modifiers)
        return a * b
    if "lo" in modifiers:
        return a * b
    sort, bits = a.dtype.kind, a.dtype.itemsize * 8
    if bits == 64:
        raise UnsupportedError("mul.hi of 64 bits")
    wide = a.astype(f"{sort}{bits // 4}") * b.astype(f"{sort}{bits // 4}")
    return wide if "wide" in modifiers else (wide >> bits).astype(a.dtype)


def multiply_add(
    modifiers: Modifiers, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> np.ndarray:
    product = multiply(modifiers, a, b)
    return product + c.view(f"{product.dtype.kind}{c.itemsize}").astype(product.dtype)


def shift_left(modifiers: Modifiers, a: np.ndarray, by: np.ndarray) -> np.ndarray:
    by = by.astype(np.uint32)  # the amount has 32 bits for every width of the value
    moved = a << np.minimum(by, a.itemsize * 8 - 1).astype(a.dtype)
    return np.where(by < a.itemsize * 8, moved, a.dtype.type(0))


def shift_right(modifiers: Modifiers, a: np.ndarray, by: np.ndarray) -> np.ndarray:
    by = by.astype(np.uint32)
    moved = a >> np.minimum(by, a.itemsize * 8 - 1).astype(a.dtype)
    lost = by >= a.itemsize * 8
    return moved if a.dtype.kind == "i" else np.where(lost, a.dtype.type(0), moved)


def permute(
    modifiers: Modifiers, a: np.ndarray, b: np.ndarray, selector: np.ndarray
) -> np.ndarray:
    pair = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros(a.size, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        value = pair >> (np.uint64(8) * (nibble & np.uint32(7))) & np.uint64(255)
        sign = np.where(value > 127, np.uint64(255), np.uint64(0))
        value = np.where(nibble > 7, sign, value)
        result |= value.astype(np.uint32) << np.uint32(8 * i)
    return result


def extract(
    modifiers: Modifiers, a: np.ndarray, start: np.ndarray, length: np.ndarray
) -> np.ndarray:
    if a.dtype.kind != "u":
        raise UnsupportedError("bfe of a signed value")
    mask = shift_left((), np.ones_like(a), length) - a.dtype.type(1)
    return shift_right((), a, start) & mask


def insert(
    modifiers: Modifiers,
    a: np.ndarray,
    b: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
) -> np.ndarray:
    mask = shift_left(
        (), shift_left((), np.ones_like(a), length) - a.dtype.type(1), start
    )
    return (b & ~mask) | (shift_left((), a, start) & mask)


def logic3(
    modifiers: Modifiers, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray
) -> np.ndarray:
    result = np.zeros_like(a)
    for row in range(8):
        term = np.where(table >> np.uint32(row) & np.uint32(1), ~a.dtype.type(0), 0)
        for source, bit in ((a, 4), (b, 2), (c, 1)):
            term = term.astype(a.dtype) & (source if row & bit else ~source)
        result |= term
    return result


def funnel(
    modifiers: Modifiers, low: np.ndarray, high: np.ndarray, by: np.ndarray
) -> np.ndarray:
    pair = high.astype(np.uint64) << np.uint64(32) | low
    by = by & np.uint32(31) if "wrap" in modifiers else np.minimum(by, np.uint32(32))
    if "l" in modifiers:
        return (pair << by.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)
    return (pair >> by.astype(np.uint64)).astype(np.uint32)


ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": floats(np.add),
    "sub": floats(np.subtract),
    "mul": multiply,
    "mad": multiply_add,
    "fma": fma,
    "div": floats(lambda a, b: a / b if a.dtype.kind == "f" else _quotient(a, b)),
    "rem": floats(lambda a, b: np.fmod(a, b)),
    "rcp": floats(lambda a: a.dtype.type(1) / a),
    "sqrt": floats(np.sqrt),
    "min": floats(np.fmin),
    "max": floats(np.fmax),
    "abs": floats(np.abs),
    "neg": floats(np.negative),
    "and": floats(np.bitwise_and),
    "or": floats(np.bitwise_or),
    "xor": floats(np.bitwise_xor),
    "not": floats(np.invert),
    "shl": shift_left,
    "shr": shift_right,
    "prmt": permute,
    "bfe": extract,
    "bfi": insert,
    "lop3": logic3,
    "shf": funnel,
}


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide integers as C does, towards zero."""
    magnitude = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -magnitude, magnitude).astype(a.dtype)
