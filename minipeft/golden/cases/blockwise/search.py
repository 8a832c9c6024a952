"""Find values on which two rules of rounding part: rare, and worth a vector."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

from minipeft.golden.cases import gaussian
from minipeft.golden.tensors import Array
from minipeft.reference.blockwise import nearest

ONE = np.float32(1)
STEPS = 4  # neighbours looked at on either side of a midpoint


def midpoints(codebook: Array) -> Array:
    """Return the float32 midpoints between neighbouring distinct values."""
    values = np.unique(codebook)
    return (values[:-1] + values[1:]) / np.float32(2)


def step(values: Any, count: int) -> Any:
    """Move by some float32 steps, up or down."""
    direction = np.float32(np.inf if count > 0 else -np.inf)
    for _ in range(abs(count)):
        values = np.nextafter(values, direction)
    return values


def division_differs(codebook: Array, wanted: int) -> Array:
    """Return [absmax, w, w, …]: w * (1/absmax) and w / absmax have other codes."""
    for absmax in _scales("division"):
        w = _around(midpoints(codebook) * absmax)
        codes = nearest(w * (ONE / absmax), codebook)
        found = w[codes != nearest(w / absmax, codebook)]
        if len(found) >= wanted:
            return np.array([absmax, *found[:wanted]], np.float32)
    raise AssertionError("unreachable: scales never end")


def scaled_ties(codebook: Array, wanted: int) -> Array:
    """Return [absmax, w, w, …]: w * (1/absmax) is a midpoint, absmax no power of 2."""
    targets = midpoints(codebook)
    for absmax in _scales("ties"):
        w = _around(targets * absmax)
        found = w[np.isin(w * (ONE / absmax), targets)]
        if len(found) >= wanted:
            return np.array([absmax, *found[:wanted]], np.float32)
    raise AssertionError("unreachable: scales never end")


def short_of_one(wanted: int) -> Array:
    """Return scales with absmax * (1/absmax) < 1 in float32."""
    scales = _scales("short of one")
    found = (a for a in scales if a * (ONE / a) < ONE)
    return np.array([next(found) for _ in range(wanted)], np.float32)


def lift_differs(codebook: Array, wanted: int) -> Array:
    """Return [absmax, w, w, …], all subnormal: 3**64 or 1e20 as a lift errs.

    The reciprocal of this absmax is finite, and division gives the same codes.
    """
    lifts = np.array([[3.0**64], [1e20]], np.float32)
    for size in _scales("lift"):
        units = np.floor(2**22 * (1 + size % 1))
        absmax = np.ldexp(np.float32(units), -149)
        near = np.rint(midpoints(codebook) * np.float64(units))
        steps = np.concatenate([near - 1, near, near + 1])
        w = np.ldexp(steps.astype(np.float32), -149)
        codes = nearest(w * (ONE / absmax), codebook)
        lifted = nearest((w * lifts) * (ONE / (absmax * lifts)), codebook)
        same = codes == nearest(w / absmax, codebook)
        found = w[same & (codes != lifted).all(axis=0)]
        if len(found) >= wanted:
            return np.array([absmax, *found[:wanted]], np.float32)
    raise AssertionError("unreachable: scales never end")


def half_scaling_differs(codebook: Array, size: int, dtype: np.dtype[Any]) -> Array:
    """Return a block whose codes change when W/absmax is computed in its own dtype."""
    for attempt in count():
        W = gaussian(f"half {dtype} {attempt}", (size,), dtype=dtype)
        wide, absmax = W.astype(np.float32), np.abs(W).max()
        codes = nearest(wide * (ONE / np.float32(absmax)), codebook)
        coarse = (W / absmax).astype(np.float32)
        if (codes != nearest(coarse, codebook)).any():
            return W
    raise AssertionError("unreachable: attempts never end")


def rounded_to_tie(value: np.float32, tie: np.float32) -> np.float32:
    """Return a scale whose float32 product with a code is a tie, but not exactly."""
    for distance in range(-STEPS, STEPS + 1):
        scale = step(np.float32(tie / value), distance)
        exact = np.float64(value) * np.float64(scale)
        if value * scale == tie and exact != tie:
            return scale
    raise ValueError(f"no scale takes {value} to {tie} by rounding")


def _scales(seed: str) -> Iterator[np.float32]:
    for batch in count():
        yield from np.abs(gaussian(f"{seed} {batch}", (64,))) + np.float32(0.01)


def _around(values: Array) -> Array:
    neighbours = [step(values, n) for n in range(-STEPS, STEPS + 1)]
    return np.unique(np.concatenate(neighbours))
