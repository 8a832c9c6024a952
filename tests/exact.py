"""Proofs over the rationals: equality, and gradients as differences without error."""

import numpy as np

from tests.strategies import rationals


def equal(a, b):
    """Exactly equal, for arrays of fractions."""
    return a.shape == b.shape and bool(np.all(a == b))


def assert_gradients(loss, values, gradients, data, steps=rationals):
    """The loss is linear in each value taken alone, so a difference is no estimate.

    (loss(v + h) - loss(v - h)) / 2 equals <gradient, h>, for any step h.
    """
    for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        assert gradient.shape == value.shape
        step = data.draw(steps(value.shape))
        up, down = list(values), list(values)
        up[i], down[i] = value + step, value - step
        slope = (gradient.astype(object) * step.astype(object)).sum()
        assert (loss(*up) - loss(*down)) / 2 == slope
