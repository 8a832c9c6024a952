"""DoRA: each row of the weight has a trained length; LoRA changes its direction."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minipeft.reference import linear, lora
from minipeft.reference.linear import Bias, Input, Output, Weight
from minipeft.reference.lora import LoRA, MatrixA, MatrixB
from minipeft.shapes import Shaped, check_shapes
from minipeft.values import check_kind

Rows = Shaped[np.ndarray, " out_features"]


@dataclass(frozen=True)
class DoRA:
    """The trained parts: a LoRA, and one length for each output row."""

    A: MatrixA
    B: MatrixB
    scaling: Any  # a float; a Fraction where a test computes over the rationals
    magnitude: Rows

    @property
    def lora(self) -> LoRA:
        """The LoRA, which changes the directions of the rows."""
        return LoRA(self.A, self.B, self.scaling)


class DoRAGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the trained parts."""

    x: Input
    A: MatrixA
    B: MatrixB
    magnitude: Rows


def init(rng: np.random.Generator, W: Weight, r: int, alpha: float) -> DoRA:
    r"""Start at the weight itself: A and B as in LoRA, and $m_i = \|W_i\|$.

    Raises:
        InputError: if r or alpha is out of range, or W is no matrix of floats.

    Source: DoRA (arXiv:2402.09353), section 4.1.
    """
    linear.check_fits(W, {})
    new = lora.init(rng, W.shape[1], W.shape[0], r, alpha)
    return DoRA(new.A, new.B, new.scaling, row_norm(W, new))


def squared_row_norm(W: Weight, update: LoRA) -> Rows:
    r"""Return the squared norm of each row of V = W + s B A, without forming V.

    $\|V_i\|^2 = \|W_i\|^2 + 2s\,(W A^T)_i \cdot B_i + s^2\,B_i (A A^T) B_i^T$: three
    thin products, whose results have O((in + out) r) numbers; V has in times out. The
    result is float32 or wider, because float16 squares overflow from a norm of 256 on.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    lora.check_fits(W, update)
    s = update.scaling
    W, A, B = (_wide(factor) for factor in (W, update.A, update.B))
    cross = np.vecdot(W @ A.T, B)
    square = np.vecdot(B @ (A @ A.T), B)
    return np.vecdot(W, W) + 2 * s * cross + s * s * square


def row_norm(W: Weight, update: LoRA) -> Rows:
    """Return the norm of each output row of W + s B A, over in_features."""
    # Rounding can make the squared norm of a zero row slightly negative.
    return np.sqrt(np.maximum(squared_row_norm(W, update), 0))


def over_norm(values: Rows, norm: Rows) -> Rows:
    """Return values / norm; for a zero row return 0.

    The direction of a zero row is defined as zero. The row stays zero and gets no
    gradient, and its output is the bias. A division would give NaN.
    """
    check_shapes({"norm": (norm, "out_features"), "values": (values, "out_features")})
    zero = norm == 0
    return np.where(zero, 0, values / np.where(zero, 1, norm))


def forward(x: Input, W: Weight, adapter: DoRA, bias: Bias | None = None) -> Output:
    r"""Apply the adapted layer: $y = g \odot (x W^T + s (x A^T) B^T) + b$.

    $g_i = m_i / \|V_i\|$ scales the output of row i without the bias.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.

    Source: DoRA (arXiv:2402.09353), equation 5.
    """
    _check_kind(adapter)
    return _forward(x, W, adapter, bias, row_norm(W, adapter.lora))


def backward(grad_y: Output, x: Input, W: Weight, adapter: DoRA) -> DoRAGradients:
    r"""Return the gradients of x, A, B and the magnitude; the norm is a constant.

    With the norm detached, DoRA's gradient is LoRA's for $g \odot G$, and the
    magnitude's is $\sum G \odot (x V^T) / \|V\|$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.

    Source: DoRA (arXiv:2402.09353), section 4.3 and equation 11.
    """
    _check_kind(adapter)
    return _backward(grad_y, x, W, adapter, row_norm(W, adapter.lora))


def merge(W: Weight, adapter: DoRA) -> Weight:
    r"""Return the weight of the plain layer: $W'_i = m_i V_i / \|V_i\|$.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.
    """
    _check_kind(adapter)
    return _merge(W, adapter, row_norm(W, adapter.lora))


# Tests compute with fractions, but the root of a fraction is no fraction. So the tests
# call the three functions below with norms of their own.


def _forward(
    x: Input, W: Weight, adapter: DoRA, bias: Bias | None, norm: Rows
) -> Output:
    linear.check_fits(W, {"x": x}, bias)
    y = _gain(W, adapter, norm) * lora.forward(x, W, adapter.lora)
    return y if bias is None else y + bias


def _backward(
    grad_y: Output, x: Input, W: Weight, adapter: DoRA, norm: Rows
) -> DoRAGradients:
    g = _gain(W, adapter, norm)
    linear.check_fits(W, {"x": x, "grad_y": grad_y})
    turned = lora.backward(g * grad_y, x, W, adapter.lora)
    rows = (grad_y * lora.forward(x, W, adapter.lora)).reshape(-1, len(norm))
    return DoRAGradients(*turned, over_norm(rows.sum(axis=0), norm))


def _merge(W: Weight, adapter: DoRA, norm: Rows) -> Weight:
    return _gain(W, adapter, norm)[:, np.newaxis] * lora.merge(W, adapter.lora)


def _gain(W: Weight, adapter: DoRA, norm: Rows) -> Rows:
    check_shapes(
        {
            "W": (W, "out_features in_features"),
            "magnitude": (adapter.magnitude, "out_features"),
        }
    )
    return over_norm(adapter.magnitude, norm)


def _check_kind(adapter: DoRA) -> None:
    check_kind("the adapter", adapter, DoRA)


def _wide(factor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    return factor.astype(np.promote_types(factor.dtype, np.float32), copy=False)
