"""VeRA: one frozen random pair for all layers, and two trained vectors per layer."""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.reference.linear import Bias, Input, Output, Weight
from minipeft.reference.lora import MatrixA, MatrixB
from minipeft.shapes import Shaped, check_shapes
from minipeft.values import check_integer, check_kind, check_number

Directions = Shaped[np.ndarray, " r"]
Rows = Shaped[np.ndarray, " out_features"]


@dataclass(frozen=True)
class Projections:
    """The frozen pair, as large as the largest layer; all layers share it."""

    A: MatrixA
    B: MatrixB


@dataclass(frozen=True)
class VeRA:
    """The trained parts of one layer: d scales the r directions, b the outputs."""

    d: Directions
    b: Rows


class VeRAGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the two vectors."""

    x: Input
    d: Directions
    b: Rows


def projections(seed: int, r: int, in_features: int, out_features: int) -> Projections:
    r"""Draw the pair that torch and peft draw for this seed, bit for bit.

    A first, then B, each $U(-\sqrt{6/n}, \sqrt{6/n})$ with n its number of columns
    (Kaiming uniform), from one MT19937 stream.

    Args:
        seed: 0 to 2**32 - 1.
        r: directions, the length of d.
        in_features: columns of the widest weight.
        out_features: rows of the tallest weight.

    Raises:
        InputError: if the seed or r is out of range.

    Source: VeRA (arXiv:2310.11454), sections 3.2 and 3.3.
    """
    check_integer("seed", seed, 0, 2**32 - 1)
    check_integer("in_features", in_features, 1)
    check_integer("out_features", out_features, 1)
    check_integer("r", r, 1)
    # RandomState, not Generator: NumPy promises never to change this stream, and torch
    # draws from the same one.
    stream = np.random.RandomState(seed)
    A = kaiming_uniform(stream, r, in_features)
    return Projections(A, kaiming_uniform(stream, out_features, r))


def kaiming_uniform(
    stream: np.random.RandomState, rows: int, columns: int
) -> Shaped[np.ndarray, "rows columns"]:
    """Draw one matrix as torch's CPU generator does, 24 bits of a word per number."""
    check_kind("stream", stream, np.random.RandomState)
    check_integer("rows", rows, 0)
    check_integer("columns", columns, 1)
    words = np.frombuffer(stream.bytes(4 * rows * columns), "<u4")
    u = (words & 0xFFFFFF) * 2.0**-24
    bound = np.float32(sqrt(6 / columns)).astype(np.float64)
    # torch scales and shifts with one rounding, a fused multiply-add in float32. In
    # float64 both steps are exact here, so the conversion is that one rounding.
    return (u * (bound + bound) - bound).astype(np.float32).reshape(rows, columns)


def fit(pair: Projections, in_features: int, out_features: int) -> Projections:
    """Return a copy of the top left corners of the pair, which a smaller layer uses.

    Raises:
        InputError: if the layer is larger than the pair, or A and B have another r.
    """
    check_kind("the pair", pair, Projections)
    check_shapes({"A": (pair.A, "r in_features"), "B": (pair.B, "out_features r")})
    check_integer("in_features", in_features, 0)
    check_integer("out_features", out_features, 0)
    widest, tallest = pair.A.shape[1], pair.B.shape[0]
    if in_features > widest or out_features > tallest:
        raise InputError(
            f"the projections serve weights up to ({tallest}, {widest}); draw them for "
            f"the largest layer, here ({out_features}, {in_features})."
        )
    A = pair.A[:, :in_features].copy()
    return Projections(A, pair.B[:out_features].copy())


def init(r: int, out_features: int, d_initial: float = 0.1) -> VeRA:
    """Start at zero update: every d is `d_initial`, every b is zero.

    Raises:
        InputError: if r is below 1, out_features below 0, or `d_initial` not finite.

    Source: VeRA (arXiv:2310.11454), section 3.3.
    """
    check_integer("r", r, 1)
    check_integer("out_features", out_features, 0)
    check_number("d_initial", d_initial)
    d = np.full(r, d_initial, np.float32)
    return VeRA(d, np.zeros(out_features, np.float32))


def delta(pair: Projections, adapter: VeRA) -> Weight:
    r"""Return the update: $\Delta W = \Lambda_b B \Lambda_d A$, diagonal Lambdas.

    Raises:
        InputError: if a vector is not as long as its side of the pair.
    """
    _check_fits(pair, adapter)
    return (adapter.b[:, np.newaxis] * pair.B * adapter.d) @ pair.A


def forward(
    x: Input, W: Weight, pair: Projections, adapter: VeRA, bias: Bias | None = None
) -> Output:
    r"""Apply the adapted layer: $y = x W^T + b_0 + b \odot ((d \odot x A^T) B^T)$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.

    Source: VeRA (arXiv:2310.11454), equation 2.
    """
    linear.check_fits(W, {"x": x}, bias)
    p = fit(pair, W.shape[1], W.shape[0])
    _check_fits(p, adapter)
    update = adapter.b * ((adapter.d * (x @ p.A.T)) @ p.B.T)
    return linear.forward(x, W, bias) + update


def backward(
    grad_y: Output, x: Input, W: Weight, pair: Projections, adapter: VeRA
) -> VeRAGradients:
    r"""Return the gradients of x, d and b; W, A and B are frozen.

    With $h = x A^T$ and $e = (G \odot b) B$: $G W + (e \odot d) A$, $\sum e \odot h$
    and $\sum G \odot ((d \odot h) B^T)$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    linear.check_fits(W, {"x": x, "grad_y": grad_y})
    p = fit(pair, W.shape[1], W.shape[0])
    _check_fits(p, adapter)
    d, b = adapter.d, adapter.b
    h = x @ p.A.T
    e = (grad_y * b) @ p.B
    grad_d = (e * h).reshape(-1, len(d)).sum(axis=0)
    grad_b = (grad_y * ((d * h) @ p.B.T)).reshape(-1, len(b)).sum(axis=0)
    return VeRAGradients(grad_y @ W + (e * d) @ p.A, grad_d, grad_b)


def merge(W: Weight, pair: Projections, adapter: VeRA) -> Weight:
    r"""Return the plain weight: $W' = W + \Lambda_b B \Lambda_d A$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    linear.check_fits(W, {})
    return W + delta(fit(pair, W.shape[1], W.shape[0]), adapter)


def _check_fits(pair: Projections, adapter: VeRA) -> None:
    """Refuse vectors of another length; NumPy would broadcast a single number."""
    check_kind("the pair", pair, Projections)
    check_kind("the adapter", adapter, VeRA)
    check_shapes(
        {
            "A": (pair.A, "r in_features"),
            "B": (pair.B, "out_features r"),
            "d": (adapter.d, "r"),
            "b": (adapter.b, "out_features"),
        }
    )
    if not len(adapter.d):
        raise InputError("r is 0; give d at least one number.")
