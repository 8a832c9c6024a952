"""VeRA in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import vera
from minipeft.reference.vera import Projections, VeRA


def vera_projections(
    seed: int, r: int, in_features: int, out_features: int
) -> tuple[Array, Array]:
    """Return the shared pair."""
    pair = vera.projections(seed, r, in_features, out_features)
    return pair.A, pair.B


def vera_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    d: Array,
    b: Array,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    return vera.forward(x, W, Projections(A, B), VeRA(d, b), bias)


def vera_backward(
    grad_y: Array, x: Array, W: Array, A: Array, B: Array, d: Array, b: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, d and b."""
    gradients = vera.backward(grad_y, x, W, Projections(A, B), VeRA(d, b))
    return gradients.x, gradients.d, gradients.b


def vera_merge(W: Array, A: Array, B: Array, d: Array, b: Array) -> Array:
    """Return the merged weight."""
    return vera.merge(W, Projections(A, B), VeRA(d, b))
