"""Three ways to compare an output with the vector: bitwise, ulp:n, gamma:n."""

import numpy as np

from minipeft.errors import InputError
from minipeft.golden.tensors import Array, Tensor

UNIT_ROUNDOFF = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}


def difference(
    rule: str, got: Tensor, expected: Tensor, magnitude: Tensor | None = None
) -> str | None:
    """Describe the first difference; return None if there is none.

    Args:
        rule: `bitwise`, `ulp:n` or `gamma:n`.
        got: what the implementation returned.
        expected: what the vector holds.
        magnitude: for `gamma:n`, the sum of the absolute values of all terms.
    """
    if (got.dtype, got.shape) != (expected.dtype, expected.shape):
        return (
            f"is {got.dtype} of shape {list(got.shape)}, "
            f"expected {expected.dtype} of shape {list(expected.shape)}"
        )
    wrong = _wrong(rule, got, expected, magnitude)
    where = np.argwhere(wrong)
    if not len(where):
        return None
    first = tuple(int(i) for i in where[0])
    return (
        f"{list(first) if first else 'value'} is {_show(got, first)}, expected "
        f"{_show(expected, first)}; {len(where)} of {wrong.size} values fail {rule}"
    )


def gamma(n: int, dtype: str) -> float:
    """Return the relative error of n roundings: n u / (1 - n u)."""
    nu = n * UNIT_ROUNDOFF[dtype]
    return nu / (1 - nu)


def _wrong(rule: str, got: Tensor, expected: Tensor, magnitude: Tensor | None) -> Array:
    name, _, count = rule.partition(":")
    if name == "bitwise":
        return np.asarray(got.bits() != expected.bits())  # scalars give no array
    if name == "ulp":
        return np.asarray(_ulps(got, expected) > int(count))
    if name == "gamma" and magnitude is not None:
        bound = gamma(int(count), expected.dtype) * magnitude.numbers()
        # Written as "not within", so that NaN counts as a difference.
        return np.asarray(~(np.abs(got.numbers() - expected.numbers()) <= bound))
    raise InputError(f"compare rule is {rule!r}; write bitwise, ulp:n or gamma:n.")


def _ulps(got: Tensor, expected: Tensor) -> Array:
    """Count the steps between two values on the line of all floats; NaN is far away."""
    steps = np.abs(_ordinal(got) - _ordinal(expected))
    nan = np.isnan(got.numbers()) != np.isnan(expected.numbers())
    return np.where(nan, np.iinfo(np.int64).max, steps)


def _ordinal(tensor: Tensor) -> Array:
    bits = tensor.bits()
    sign_bit = 1 << (8 * bits.dtype.itemsize - 1)
    magnitude = (bits & (sign_bit - 1)).astype(np.int64)
    return np.where(bits & sign_bit, -magnitude, magnitude)


def _show(tensor: Tensor, index: tuple[int, ...]) -> str:
    bits = int(tensor.bits()[index])
    pattern = f"0x{bits:0{2 * tensor.bits().dtype.itemsize}x}"
    if tensor.dtype == "uint8":
        return pattern
    return f"{tensor.numbers()[index]:.9g} ({pattern})"
