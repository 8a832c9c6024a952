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

    $\hat W$ is the dequantized base: four bits are for storage, not for arithmetic. Its
    product is computed in the dtype of x, the update in that of A and B; their sum is
    rounded once.

    Args:
        x: float32, float16 or `ml_dtypes.bfloat16`; the result has the same dtype.
        q: the base, from `blockwise.quantize` or `double_quant.quantize`.
        lora: the adapter, in float32 if small steps are not to be rounded away.
        bias: of the base.

    Source: QLoRA (arXiv:2305.14314), equations 5 and 6.
    """
    bias = None if bias is None else bias.astype(x.dtype)
    return lora_.forward(x, dequantize(q, x.dtype), lora, bias).astype(x.dtype)


def backward(
    grad_y: Inexact[np.ndarray, "... out_features"],
    x: Inexact[np.ndarray, "... in_features"],
    q: Blockwise | Nested,
    lora: LoRA,
) -> LoRAGradients:
    r"""Return the gradients of x, A and B; the base is frozen and gets none.

    The gradient of x passes through $\hat W$, which is dequantized once more rather
    than kept, and has the dtype of x; the others have those of A and B.

    Source: QLoRA (arXiv:2305.14314), section 3.
    """
    grads = lora_.backward(grad_y, x, dequantize(q, x.dtype), lora)
    return grads._replace(x=grads.x.astype(x.dtype))


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
