"""The paired comparison of times, on data whose p is known."""

import math

import pytest

from minipeft.errors import InputError
from minipeft.lab import paired

# Darwin's 15 pairs of maize plants, crossed minus self-fertilized, in eighths of an
# inch. Fisher counted 1,726 of the 32,768 patterns that lie as far from 0.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_the_test_gives_what_fisher_counted():
    assert paired.sign_flip(DARWIN) == 1726 / 32768


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_differences_of_one_sign_have_the_smallest_p(n):
    assert paired.sign_flip([1.5] * n) == 2 / 2**n
    assert paired.sign_flip([-0.1 * (k + 1) for k in range(n)]) == 2 / 2**n


def test_p_does_not_depend_on_the_sign_or_the_unit():
    p = paired.sign_flip(DARWIN)
    assert paired.sign_flip([-4.0 * d for d in DARWIN]) == p
    assert paired.sign_flip([0.0, 0.0]) == 1


def test_a_ratio_is_the_geometric_mean_with_its_ends():
    found = paired.ratio([2.0, 4.0, 1.0])
    assert found.mean == pytest.approx(2.0)
    assert (found.smallest, found.largest) == pytest.approx((1.0, 4.0))
    assert found.p == 0.5  # the sign of log 1 = 0 changes nothing: 4 patterns of 8
    assert str(found) == "2.000 (1.000 to 4.000)"


@pytest.mark.parametrize(
    ("differences", "message"),
    [([], "0 pairs"), ([1.0] * 21, "21 pairs"), ([math.nan], "not finite")],
)
def test_what_cannot_be_tested_is_refused(differences, message):
    with pytest.raises(InputError, match=message):
        paired.sign_flip(differences)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_ratio_that_is_none_is_refused(bad):
    with pytest.raises(InputError, match="not positive and finite"):
        paired.ratio([1.0, bad])


def test_every_way_is_prepared_warmed_and_timed_in_changing_order():
    seen = []

    def way(name):
        def ready():
            seen.append(f"{name} ready")
            return lambda: seen.append(name)

        return ready

    def clock(turn):
        turn()
        return float(len(seen))

    seconds = paired.in_turns({n: way(n) for n in "abc"}, 4, clock)
    calls = [name for name in seen if "ready" not in name]
    assert "".join(calls[::2]) == "abc" + "cba" + "bca" + "acb"
    assert calls[::2] == calls[1::2]  # once before it is timed
    assert seen[:4] == ["a ready", "a", "a ready", "a"]
    assert [len(values) for values in seconds.values()] == [4, 4, 4]
