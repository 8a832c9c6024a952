"""Compare times in pairs: how much longer one way takes, and whether chance says so."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minipeft.errors import InputError
from minipeft.lab.timing import Clock, Turn

MOST = 20
"""Pairs whose 2^n patterns of signs are all counted."""

Ready = Callable[[], Turn]
"""Prepares what is timed, outside of the timed part."""


@dataclass(frozen=True)
class Ratio:
    """How many times as long one way takes as another.

    Attributes:
        mean: the geometric mean over the pairs.
        smallest: of the pairs.
        largest: of the pairs.
        p: of the sign-flip test on the logarithms.
    """

    mean: float
    smallest: float
    largest: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.smallest:.3f} to {self.largest:.3f})"


def ratio(pairs: Sequence[float]) -> Ratio:
    """Return how many times as long one way takes, over all pairs.

    Args:
        pairs: the ratio of the two times of each pair.

    Raises:
        InputError: a ratio is not positive and finite, or as `sign_flip`.
    """
    if not all(0 < value < math.inf for value in pairs):
        raise InputError("a ratio is not positive and finite; time the pairs again")
    logs = [math.log(value) for value in pairs]
    mean = math.exp(statistics.fmean(logs))
    return Ratio(mean, min(pairs), max(pairs), sign_flip(logs))


def sign_flip(differences: Sequence[float]) -> float:
    r"""Return p of the two-sided sign-flip test, that of Fisher's randomization.

    If only chance decides which member of a pair is the larger one, all patterns of
    signs are alike. p is the share of those that are at least as far from 0:

    $p = 2^{-n}\,\#\{s \in \{-1, 1\}^n : |\sum s_i d_i| \ge |\sum d_i|\}$

    Args:
        differences: of n pairs.

    Raises:
        InputError: there are none, more than 20, or one is not finite.

    Source: Fisher 1935, The Design of Experiments, section 21.
    """
    d = np.asarray(differences, np.float64)
    if not 1 <= len(d) <= MOST:
        raise InputError(f"there are {len(d)} pairs; give 1 to {MOST}")
    if not np.isfinite(d).all():
        raise InputError("a difference is not finite; leave the pair out")
    signs = np.array([*itertools.product((1.0, -1.0), repeat=len(d))])
    sums = np.abs((signs * d).sum(axis=1))
    return float((sums >= sums[0]).mean())  # the first pattern has no minus


def in_turns(
    ways: Mapping[str, Ready], rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Time every way once a round, after one call that is not timed.

    Each round begins with another way, and every second one runs backwards, so that no
    way has the same one before it each time.

    Args:
        ways: by name.
        rounds: how often.
        clock: returns the seconds of a turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for i in range(rounds):
        first = i // 2 % len(names)
        order = names[first:] + names[:first]
        for name in order if i % 2 == 0 else reversed(order):
            ways[name]()()
            seconds[name].append(clock(ways[name]()))
    return seconds
