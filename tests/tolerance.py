"""How much two results may differ: not at all, or by a bound that is derived here.

Only this file contains tolerances. `gamma` is Higham's bound for n
roundings (Accuracy and Stability of Numerical Algorithms, section 3.1): a sum of n
products, in any order, errs by at most gamma(n) times the sum of absolute products.
"""

import numpy as np

UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
}
SMALLEST_SUBNORMAL = {"float64": 2.0**-1074, "float32": 2.0**-149}


def gamma(n: int, dtype="float32") -> float:
    """Relative error of n roundings: n u / (1 - n u)."""
    u = UNIT_ROUNDOFF[str(np.dtype(dtype)) if not isinstance(dtype, str) else dtype]
    assert n * u < 1, f"{n} roundings in {dtype} say nothing about the result"
    return n * u / (1 - n * u)


def svd_roundings(W) -> int:
    """Return 4 (m + n), the number of roundings that stands for an SVD of W (m x n).

    LAPACK's manual says |W - U S V^T| <= p(m, n) u |W| with a slowly growing p, but
    gives no formula for p. LAPACK's own tests allow p = 70 max(m, n) (TESTING/svd.in:
    35 max(m, n) last bits), and as much for the orthogonality of U and V. We allow a
    ninth of that: 4 (m + n) is at most 8 max(m, n).
    """
    return 4 * sum(W.shape)


def assert_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Same dtype, same shape, same bytes."""
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.tobytes() != expected.tobytes():
        kind = f"u{actual.dtype.itemsize}"
        where = np.argwhere(actual.view(kind) != expected.view(kind))
        first = tuple(where[0])
        raise AssertionError(
            f"{len(where)} of {actual.size} differ, first at {first}: "
            f"{actual[first]!r} is not {expected[first]!r}"
        )


def assert_sums(actual: np.ndarray, expected: np.ndarray) -> None:
    """Same bits, except for signs of zeros, which a sum that starts at 0 changes."""
    zero = np.zeros((), actual.dtype)  # -0 + 0 = 0; no other value changes
    assert_bits(actual + zero, expected + zero)


def assert_within(actual, exact, bound) -> None:
    """|actual - exact| <= bound, everywhere, compared in float64."""
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    excess = np.abs(actual - exact) - bound
    worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.size else ()
    assert not excess.size or excess[worst] <= 0, (
        f"off by {abs(actual[worst] - exact[worst]):.3e} at {worst}, "
        f"allowed {np.broadcast_to(bound, excess.shape)[worst]:.3e}"
    )


def matmul_bound(*factors: np.ndarray, roundings: int, dtype="float32") -> np.ndarray:
    """gamma(roundings) times the product of the factors' absolute values."""
    product = np.abs(np.asarray(factors[0], np.float64))
    for factor in factors[1:]:
        product = product @ np.abs(np.asarray(factor, np.float64))
    return gamma(roundings, dtype) * product


def central_difference(f, noise: float, h=2.0**-14) -> tuple[float, float]:
    """Return the slope of a float64 function at 0, and the bound of its error.

    D(h) = (f(h) - f(-h)) / 2h errs by a sixth of the third derivative times h^2 and
    higher orders, of which D(2h) shows four times as much; and by noise / h, if a value
    of f errs by `noise`.
    """
    slope, coarse = ((f(t) - f(-t)) / (2 * t) for t in (h, 2 * h))
    return slope, abs(coarse - slope) + noise / h
