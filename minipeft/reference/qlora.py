"""QLoRA: a frozen base in four bits, a LoRA beside it in sixteen."""

import numpy as np
from numpy.typing import DTypeLike

from minipeft.errors import InputError
from minipeft.reference import blockwise, double_quant
from minipeft.reference import lora as lora_
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.double_quant import Nested
from minipeft.reference.lora import LoRA, LoRAGradients
from minipeft.shapes import Inexact

TARGETS = ("dequantized", "requantized")


def forward(
    x: Inexact[np.ndarray, "... in_features"],
    q: Blockwise | Nested,
    lora: LoRA,
    bias: Inexact[np.ndarray, " out_features"] | None = None,
) -> Inexact[np.ndarray, "... out_features"]:
    r"""Apply the adapted layer: $y = x \hat W^T + b + s (x A^T) B^T$.

    $\hat W$ is the dequantized base. Four bits are for storage alone: the products are
    computed in the dtype of x.

    Args:
        x: float32, float16 or `ml_dtypes.bfloat16`; the result has the same dtype.
        q: the base, from `blockwise.quantize` or `double_quant.quantize`.
        lora: the adapter; stored in float32, rounded to the dtype of x for its part.
        bias: of the base.

    Source: QLoRA (arXiv:2305.14314), equations 5 and 6.
    """
    bias = None if bias is None else bias.astype(x.dtype)
    y = lora_.forward(x, dequantize(q, x.dtype), _rounded(lora, x.dtype), bias)
    return y.astype(x.dtype)  # a float times bfloat16 is float32 in NumPy


def backward(
    grad_y: Inexact[np.ndarray, "... out_features"],
    x: Inexact[np.ndarray, "... in_features"],
    q: Blockwise | Nested,
    lora: LoRA,
) -> LoRAGradients:
    r"""Return the gradients of x, A and B; the base is frozen and gets none.

    The gradient of x passes through $\hat W$, which is dequantized once more rather
    than kept. Those of A and B are computed in the dtype of x, returned in their own.

    Source: QLoRA (arXiv:2305.14314), section 3.
    """
    W, rounded = dequantize(q, x.dtype), _rounded(lora, x.dtype)
    grads = lora_.backward(grad_y, x, W, rounded)
    A, B = grads.A.astype(lora.A.dtype), grads.B.astype(lora.B.dtype)
    return LoRAGradients(grads.x.astype(x.dtype), A, B)


def merge(
    q: Blockwise | Nested, lora: LoRA, into: str = "dequantized"
) -> Inexact[np.ndarray, "out_features in_features"] | Blockwise | Nested:
    r"""Return a base that does the same without the adapter, or nearly.

    Into the dequantized weight: $\hat W + s B A$, the function that was trained; eight
    times the bytes. Requantized: that weight in four bits again, where an update
    smaller than half a gap of the codebook disappears. (Into the original W, that is
    `lora.merge`: neither rounding, but not what the adapter was trained on.)

    Args:
        q: the base.
        lora: the adapter.
        into: `dequantized` (returns float32) or `requantized` (the same kind as q).

    Raises:
        InputError: if `into` is neither.
    """
    if into not in TARGETS:
        raise InputError(f"into is {into!r}; choose {' or '.join(TARGETS)}.")
    W = lora_.merge(dequantize(q), lora)
    if into == "dequantized":
        return W
    if isinstance(q, Blockwise):
        return blockwise.quantize(W, q.codebook, q.blocksize)
    return double_quant.quantize(W, q.codebook, q.blocksize, q.nested_blocksize)


def dequantize(
    q: Blockwise | Nested, dtype: DTypeLike = np.float32
) -> Inexact[np.ndarray, "out_features in_features"]:
    """Return the weight, whichever way its scales are stored."""
    if isinstance(q, Nested):
        return double_quant.dequantize(q, dtype)
    return blockwise.dequantize(q, dtype)


def _rounded(lora: LoRA, dtype: DTypeLike) -> LoRA:
    return LoRA(lora.A.astype(dtype), lora.B.astype(dtype), lora.scaling)
