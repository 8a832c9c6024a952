"""Checks with fractions: exact equality, and gradients as exact differences."""

import numpy as np

from tests.strategies import rationals


def equal(a, b):
    """Check that arrays of fractions are equal."""
    return a.shape == b.shape and bool(np.all(a == b))


def assert_gradients(loss, values, gradients, data, steps=rationals):
    """Check gradients; the loss is linear in each value, so differences are exact.

    (loss(v + h) - loss(v - h)) / 2 equals <gradient, h>, for any step h.
    """
    for i, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        assert gradient.shape == value.shape
        step = data.draw(steps(value.shape))
        up, down = list(values), list(values)
        up[i], down[i] = value + step, value - step
        slope = (gradient.astype(object) * step.astype(object)).sum()
        assert (loss(*up) - loss(*down)) / 2 == slope
