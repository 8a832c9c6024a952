r"""Power laws with a floor: fitted, with a band from resampled seeds.

$L(x) = E + a\,x^{-b}$ is the form in which losses fall with data, size and rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minipeft.errors import InputError
from minipeft.shapes import Float
from minipeft.values import checked

EXPONENTS = (0.01, 10.0)
"""The smallest and the largest exponent b that a fit may take."""
TRIED = 100
"""Exponents that are tried at once; the best one's neighbours bound the next trial."""
ROUNDS = 6


@dataclass(frozen=True)
class PowerLaw:
    r"""A law $L(x) = E + a\,x^{-b}$.

    Attributes:
        floor: E, the loss at infinite x, in nats.
        scale: a, in nats.
        exponent: b.
    """

    floor: float
    scale: float
    exponent: float

    def __call__(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the law's losses at x, (n,)."""
        values: np.ndarray = self.floor + self.scale * x**-self.exponent
        return values


@checked
def fit(
    x: Float[np.ndarray, " n"],
    losses: Float[np.ndarray, " losses"],
    floor: float | None = None,
) -> PowerLaw:
    r"""Return the law with the least $\sum_i (E + a\,x_i^{-b} - L_i)^2$ and $E \ge 0$.

    For each b the best E and a are those of linear least squares in $x^{-b}$; b itself
    is searched on ever finer grids.

    Args:
        x: ranks, examples or parameters, (n,), all above 0.
        losses: L, (n,), in nats.
        floor: E, if it is known; None: it is fitted.

    Raises:
        InputError: there are fewer different x than numbers to fit, or one is not
            above 0, or a loss is not finite.

    Source: Zhang and others 2024, their joint law with one factor.
    """
    _check(x, losses, 2 if floor is not None else 3)
    low, high = EXPONENTS
    for _ in range(ROUNDS):
        tried = np.geomspace(low, high, TRIED)
        errors, floors, scales = _least_squares(x, losses, tried, floor)
        best = int(errors.argmin())
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, TRIED - 1)]
    return PowerLaw(float(floors[best]), float(scales[best]), float(tried[best]))


@checked
def resampled(
    x: Float[np.ndarray, " n"],
    losses: Float[np.ndarray, "n seeds"],
    floor: float | None = None,
    draws: int = 500,
) -> list[PowerLaw]:
    """Return one law for each draw of the seeds: the bootstrap.

    At every x the seeds are drawn with replacement and averaged, and a law is fitted.
    With k seeds the spread comes out smaller by a factor of about √((k − 1)/k).

    Args:
        x: as in `fit`, (n,).
        losses: of each seed, (n, seeds), in nats.
        floor: as in `fit`.
        draws: laws to fit.

    Raises:
        InputError: as `fit`.

    Source: Efron 1979.
    """
    rng = np.random.default_rng(0)
    points, seeds = losses.shape
    drawn = rng.integers(seeds, size=(draws, points, seeds))
    means = losses[np.arange(points)[None, :, None], drawn].mean(axis=2)
    return [fit(x, one, floor) for one in means]


@checked
def band(
    laws: Sequence[PowerLaw], x: Float[np.ndarray, " n"], share: float = 0.95
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return the two quantiles at each x between which this share of the laws lies.

    Args:
        laws: from `resampled`.
        x: (n,).
        share: in (0, 1).

    Raises:
        InputError: the share lies outside (0, 1), or there is no law.
    """
    if not 0 < share < 1 or not laws:
        raise InputError(
            f"share is {share} of {len(laws)} laws; give a number between 0 and 1, and "
            "at least one law"
        )
    values = np.array([law(x) for law in laws])
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2], axis=0)
    return low, high


def _check(x: np.ndarray, losses: np.ndarray, least: int) -> None:
    if len(x) != len(losses) or len(np.unique(x)) < least:
        raise InputError(
            f"there are {len(losses)} losses at {len(np.unique(x))} different x; give "
            f"one loss for each x, and at least {least}"
        )
    if not (np.all(x > 0) and np.all(np.isfinite(losses))):
        raise InputError(
            f"the smallest x is {x.min():g} and the losses are {losses}; give x above "
            "0 and finite losses"
        )


def _least_squares(
    x: np.ndarray, losses: np.ndarray, tried: np.ndarray, floor: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return squared errors, floors and scales, one for each exponent."""
    z = x[None, :] ** -tried[:, None]
    if floor is None:
        middle = z.mean(axis=1, keepdims=True)
        away = z - middle
        scales = (away * (losses - losses.mean())).sum(axis=1) / (away**2).sum(axis=1)
        floors = losses.mean() - scales * middle[:, 0]
    else:
        floors = np.full(len(tried), floor)
    known = floors < 0 if floor is None else np.ones(len(tried), dtype=bool)
    floors = np.where(known, floor or 0.0, floors)
    alone = (z * (losses - floors[:, None])).sum(axis=1) / (z**2).sum(axis=1)
    scales = alone if floor is not None else np.where(known, alone, scales)
    errors = ((floors[:, None] + scales[:, None] * z - losses) ** 2).sum(axis=1)
    return errors, floors, scales
