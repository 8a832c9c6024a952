"""VeRA: one frozen random pair for every layer, and two trained vectors for each."""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.shapes import Shaped


@dataclass(frozen=True)
class Projections:
    """The frozen pair, as large as the largest layer; all layers share it."""

    A: Shaped[np.ndarray, "r in_features"]
    B: Shaped[np.ndarray, "out_features r"]


@dataclass(frozen=True)
class VeRA:
    """The trained parts of one layer: d scales the r directions, b the outputs."""

    d: Shaped[np.ndarray, " r"]
    b: Shaped[np.ndarray, " out_features"]


class VeRAGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the two vectors."""

    x: Shaped[np.ndarray, "... in_features"]
    d: Shaped[np.ndarray, " r"]
    b: Shaped[np.ndarray, " out_features"]


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

    Source: VeRA (arXiv:2310.11454), section 3.2.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; choose 0 to {2**32 - 1}.")
    if r < 1:
        raise InputError(f"r is {r}; choose 1 or more.")
    # Not a Generator: this stream is frozen by NumPy's promise, and it is torch's.
    stream = np.random.RandomState(seed)
    A = kaiming_uniform(stream, r, in_features)
    return Projections(A, kaiming_uniform(stream, out_features, r))


def kaiming_uniform(
    stream: np.random.RandomState, rows: int, columns: int
) -> Shaped[np.ndarray, "rows columns"]:
    """Draw one matrix as torch's CPU generator does: 24 bits of a word a number."""
    words = np.frombuffer(stream.bytes(4 * rows * columns), "<u4")
    u = (words & 0xFFFFFF) * 2.0**-24
    bound = np.float32(sqrt(6 / columns)).astype(np.float64)
    # torch scales and shifts with one rounding, a fused multiply-add in float32. In
    # float64 both steps are exact here, so the conversion is that one rounding.
    return (u * (bound + bound) - bound).astype(np.float32).reshape(rows, columns)


def fit(pair: Projections, in_features: int, out_features: int) -> Projections:
    """Return the part of the pair that a smaller layer uses: the top left corners.

    Raises:
        InputError: if the layer is larger than the pair.
    """
    widest, tallest = pair.A.shape[1], pair.B.shape[0]
    if in_features > widest or out_features > tallest:
        raise InputError(
            f"the projections serve weights up to ({tallest}, {widest}); draw them for "
            f"the largest layer, here ({out_features}, {in_features})."
        )
    return Projections(pair.A[:, :in_features], pair.B[:out_features])


def init(r: int, out_features: int, d_initial: float = 0.1) -> VeRA:
    """Start at zero update: every d is `d_initial`, every b is zero.

    Source: VeRA (arXiv:2310.11454), section 3.2.
    """
    d = np.full(r, d_initial, np.float32)
    return VeRA(d, np.zeros(out_features, np.float32))


def delta(
    projections: Projections, vera: VeRA
) -> Shaped[np.ndarray, "out_features in_features"]:
    r"""Return the update: $\Delta W = \Lambda_b B \Lambda_d A$, diagonal Lambdas."""
    return (vera.b[:, np.newaxis] * projections.B * vera.d) @ projections.A


def forward(
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
    projections: Projections,
    vera: VeRA,
    bias: Shaped[np.ndarray, " out_features"] | None = None,
) -> Shaped[np.ndarray, "... out_features"]:
    r"""Apply the adapted layer: $y = x W^T + b_0 + b \odot ((d \odot x A^T) B^T)$.

    Source: VeRA (arXiv:2310.11454), equation 2.
    """
    p = fit(projections, W.shape[1], W.shape[0])
    return linear.forward(x, W, bias) + vera.b * ((vera.d * (x @ p.A.T)) @ p.B.T)


def backward(
    grad_y: Shaped[np.ndarray, "... out_features"],
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
    projections: Projections,
    vera: VeRA,
) -> VeRAGradients:
    r"""Return the gradients of x, d and b; W, A and B are frozen.

    With $h = x A^T$ and $e = (G \odot b) B$: $G W + (e \odot d) A$, $\sum e \odot h$
    and $\sum G \odot ((d \odot h) B^T)$.
    """
    p = fit(projections, W.shape[1], W.shape[0])
    h, e = x @ p.A.T, (grad_y * vera.b) @ p.B
    grad_d = (e * h).reshape(-1, len(vera.d)).sum(axis=0)
    grad_b = (grad_y * ((vera.d * h) @ p.B.T)).reshape(-1, len(vera.b)).sum(axis=0)
    return VeRAGradients(grad_y @ W + (e * vera.d) @ p.A, grad_d, grad_b)


def merge(
    W: Shaped[np.ndarray, "out_features in_features"],
    projections: Projections,
    vera: VeRA,
) -> Shaped[np.ndarray, "out_features in_features"]:
    r"""Return the plain weight: $W' = W + \Lambda_b B \Lambda_d A$."""
    return W + delta(fit(projections, W.shape[1], W.shape[0]), vera)
