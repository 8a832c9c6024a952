"""Verdicts on published numbers."""

from fractions import Fraction

import pytest

from minipeft.errors import InputError
from minipeft.lab.published import verdict


@pytest.mark.parametrize(
    ("printed", "count", "reason", "expected"),
    [
        ("4.7 M", 4_718_592, "", "equal"),
        ("18.8 M", 18_874_368, "", "truncated"),
        ("18.9 M", 18_874_368, "", "equal"),
        ("18.7 M", 18_874_368, "", "unexplained"),
        ("18.7 M", 18_874_368, "another rank", "off"),
        ("9,175,040", 9_175_040, "", "equal"),
        ("9,175,041", 9_175_040, "", "unexplained"),
        ("18 MiB", 18 * 2**20, "", "equal"),
        (".83 %", Fraction(8256, 1_000_000), "", "equal"),
        ("2.5", Fraction(245, 100), "", "equal"),
        ("2.5", Fraction(255, 100), "", "truncated"),
    ],
)
def test_the_verdict_follows_from_the_printed_digits(printed, count, reason, expected):
    assert verdict(printed, count, reason) == expected


@pytest.mark.parametrize("printed", ["4.7 G", "about 3 M"])
def test_what_is_no_number_is_refused(printed):
    with pytest.raises(InputError, match=r"no known unit|no number"):
        verdict(printed, 1)
