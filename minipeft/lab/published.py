"""Compare a printed number with a count: equal, truncated, off, or unexplained."""

from collections.abc import Mapping
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from fractions import Fraction

from minipeft.errors import InputError

UNITS: Mapping[str, int | Fraction] = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "%": Fraction(1, 100),
    "bit": 1,
}
VERDICTS = ("equal", "truncated", "off", "unexplained")


def verdict(printed: str, count: float | Fraction, reason: str = "") -> str:
    """Return how a printed number stands to a count.

    `equal`: the count, rounded to the printed digits. `truncated`: the count, cut off
    there. Else `off` where a reason is given, and `unexplained` where there is none.

    Args:
        printed: as the paper prints it, with one of `UNITS`: "4.7 M".
        count: in units of one.
        reason: what explains the difference.

    Raises:
        InputError: the printed number has no known unit, or is no number.
    """
    number, _, unit = printed.replace(",", "").partition(" ")
    if unit not in UNITS:
        raise InputError(f"{printed!r} has no known unit; choose {', '.join(UNITS)}")
    try:
        wanted = Decimal(number)
    except ArithmeticError:
        raise InputError(f"{printed!r} is no number; write it as '4.7 M'") from None
    found = Fraction(count) / Fraction(UNITS[unit])
    exact = Decimal(found.numerator) / Decimal(found.denominator)
    digit = Decimal(1).scaleb(int(wanted.as_tuple().exponent))
    if exact.quantize(digit, ROUND_HALF_UP) == wanted:
        return "equal"
    if exact.quantize(digit, ROUND_DOWN) == wanted:
        return "truncated"
    return "off" if reason else "unexplained"
