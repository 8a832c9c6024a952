"""DoRA: every row of the weight has a trained length, and LoRA turns its direction."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minipeft.reference import lora as lora_
from minipeft.shapes import Shaped


@dataclass(frozen=True)
class DoRA:
    """The trained parts: LoRA's, and one length for each output row."""

    A: Shaped[np.ndarray, "r in_features"]
    B: Shaped[np.ndarray, "out_features r"]
    scaling: Any  # a float; a Fraction where a test computes over the rationals
    magnitude: Shaped[np.ndarray, " out_features"]

    @property
    def lora(self) -> lora_.LoRA:
        """The part that turns the rows."""
        return lora_.LoRA(self.A, self.B, self.scaling)


class DoRAGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the trained parts."""

    x: Shaped[np.ndarray, "... in_features"]
    A: Shaped[np.ndarray, "r in_features"]
    B: Shaped[np.ndarray, "out_features r"]
    magnitude: Shaped[np.ndarray, " out_features"]


def init(
    rng: np.random.Generator,
    W: Shaped[np.ndarray, "out_features in_features"],
    r: int,
    alpha: float,
) -> DoRA:
    r"""Start at the weight itself: LoRA's A and B, and $m_i = \|W_i\|$.

    Source: DoRA (arXiv:2402.09353), section 4.1.
    """
    new = lora_.init(rng, W.shape[1], W.shape[0], r, alpha)
    return DoRA(new.A, new.B, new.scaling, row_norm(W, new))


def squared_row_norm(
    W: Shaped[np.ndarray, "out_features in_features"], lora: lora_.LoRA
) -> Shaped[np.ndarray, " out_features"]:
    r"""Return the squared norm of each row of V = W + s B A, without forming V.

    $\|V_i\|^2 = \|W_i\|^2 + 2s\,(W A^T)_i \cdot B_i + s^2\,B_i (A A^T) B_i^T$: three
    thin products, O((in + out) r) numbers of memory where V has in times out.
    """
    A, B, s = lora.A, lora.B, lora.scaling
    cross, square = np.vecdot(W @ A.T, B), np.vecdot(B @ (A @ A.T), B)
    return np.vecdot(W, W) + 2 * s * cross + s * s * square


def row_norm(
    W: Shaped[np.ndarray, "out_features in_features"], lora: lora_.LoRA
) -> Shaped[np.ndarray, " out_features"]:
    """Return the norm of each output row of W + s B A, over in_features."""
    # Rounding can leave a row that cancels to zero slightly below it.
    return np.sqrt(np.maximum(squared_row_norm(W, lora), 0))


def over_norm(
    values: Shaped[np.ndarray, " out_features"],
    norm: Shaped[np.ndarray, " out_features"],
) -> Shaped[np.ndarray, " out_features"]:
    r"""Return values / norm, and 0 for a zero row.

    The direction of a zero row is zero by definition: the row stays zero, passes no
    gradient, and its output is the bias. Dividing would make it NaN.
    """
    zero = norm == 0
    return np.where(zero, 0, values / np.where(zero, 1, norm))


def forward(
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
    dora: DoRA,
    bias: Shaped[np.ndarray, " out_features"] | None = None,
    norm: Shaped[np.ndarray, " out_features"] | None = None,
) -> Shaped[np.ndarray, "... out_features"]:
    r"""Apply the adapted layer: $y = g \odot (x W^T + s (x A^T) B^T) + b$.

    $g_i = m_i / \|V_i\|$ scales the output of row i, and never the bias.

    Args:
        x: the input.
        W: the frozen weight.
        dora: the trained parts.
        bias: added last.
        norm: of the rows of W + s B A; computed where it is not given.

    Source: DoRA (arXiv:2402.09353), equation 5.
    """
    norm = row_norm(W, dora.lora) if norm is None else norm
    g = over_norm(dora.magnitude, norm)
    y = g * lora_.forward(x, W, dora.lora)
    return y if bias is None else y + bias


def backward(
    grad_y: Shaped[np.ndarray, "... out_features"],
    x: Shaped[np.ndarray, "... in_features"],
    W: Shaped[np.ndarray, "out_features in_features"],
    dora: DoRA,
    norm: Shaped[np.ndarray, " out_features"] | None = None,
) -> DoRAGradients:
    r"""Return the gradients of x, A, B and the magnitude; the norm is a constant.

    With the norm detached, DoRA's gradient is LoRA's for $g \odot G$, and the
    magnitude's is $\sum G \odot (x V^T) / \|V\|$.

    Source: DoRA (arXiv:2402.09353), section 4.3 and equation 11.
    """
    norm = row_norm(W, dora.lora) if norm is None else norm
    g = over_norm(dora.magnitude, norm)
    turned = lora_.backward(g * grad_y, x, W, dora.lora)
    rows = (grad_y * lora_.forward(x, W, dora.lora)).reshape(-1, len(norm))
    return DoRAGradients(*turned, over_norm(rows.sum(axis=0), norm))


def merge(
    W: Shaped[np.ndarray, "out_features in_features"],
    dora: DoRA,
    norm: Shaped[np.ndarray, " out_features"] | None = None,
) -> Shaped[np.ndarray, "out_features in_features"]:
    r"""Return the weight of the plain layer: $W'_i = m_i V_i / \|V_i\|$."""
    norm = row_norm(W, dora.lora) if norm is None else norm
    g = over_norm(dora.magnitude, norm)
    return g[:, np.newaxis] * lora_.merge(W, dora.lora)
