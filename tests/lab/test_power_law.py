"""Power laws: exact ones are found again, and bands hold what they should."""

import numpy as np
import pytest

from minipeft.errors import InputError
from minipeft.lab.power_law import PowerLaw, band, fit, resampled

X = np.array([1.0, 2, 4, 8, 16, 64])
LAWS = [PowerLaw(3.5, 0.4, 0.5), PowerLaw(0.0, 5.0, 0.05), PowerLaw(1.0, -0.3, 2.0)]


def digits(law):
    return [round(value, 4) for value in (law.floor, law.scale, law.exponent)]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_found_from_its_own_losses(law):
    assert digits(fit(X, law(X))) == digits(law)


def test_a_known_floor_needs_only_two_points():
    law = PowerLaw(2.0, 3.0, 0.3)
    assert digits(fit(X[:2], law(X[:2]), floor=2.0)) == digits(law)


def test_the_fit_has_the_least_squares_of_all_exponents():
    rng = np.random.default_rng(0)
    losses = LAWS[0](X) + 0.02 * rng.standard_normal(len(X))
    found = fit(X, losses)
    least = ((found(X) - losses) ** 2).sum()
    for b in np.geomspace(0.05, 5, 40):
        columns = np.stack([np.ones(len(X)), X**-b], axis=1)
        line, *_ = np.linalg.lstsq(columns, losses, rcond=None)
        if line[0] >= 0:  # a floor below zero is not allowed
            assert least <= ((columns @ line - losses) ** 2).sum()


def test_the_floor_is_never_below_zero():
    falling = fit(X, 10 - 2 * np.log2(X + 1))
    assert falling.floor >= 0


def test_a_band_is_narrow_where_the_seeds_agree():
    law, rng = LAWS[0], np.random.default_rng(0)
    noise = rng.standard_normal((len(X), 3))
    widths = []
    for size in (0.0, 0.001, 0.01):
        low, high = band(resampled(X, law(X)[:, None] + size * noise, draws=50), X)
        assert (low <= high).all()
        widths.append((high - low).max())
    assert widths[0] < widths[1] < widths[2]
    assert round(float(widths[0]), 6) == 0


def test_the_same_seeds_give_the_same_band():
    losses = LAWS[0](X)[:, None] + np.array([[-0.01, 0.0, 0.02]])
    assert resampled(X, losses, draws=3) == resampled(X, losses, draws=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(X[:2], X[:2]), "2 losses at 2 different x; .* at least 3"),
        (lambda: fit(X, X[:3]), "3 losses at 6"),
        (lambda: fit(X - 1, X), "smallest x is 0"),
        (lambda: fit(X, X * np.nan), "finite losses"),
        (lambda: band([], X), "0 laws"),
        (lambda: band([LAWS[0]], X, 1.0), "share is 1.0"),
    ],
)
def test_what_no_law_fits_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
