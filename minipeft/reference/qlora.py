"""QLoRA: a frozen base in four bits, and a LoRA in sixteen or more."""

import numpy as np
from numpy.typing import DTypeLike

from minipeft.reference import blockwise, double_quant, lora
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.double_quant import Nested
from minipeft.reference.lora import LoRA, LoRAGradients
from minipeft.shapes import Float, check_shapes
from minipeft.values import check_kind

Bias = Float[np.ndarray, " out_features"]
Input = Float[np.ndarray, "... in_features"]
Output = Float[np.ndarray, "... out_features"]
Weight = Float[np.ndarray, "out_features in_features"]
Base = Blockwise | Nested


def forward(x: Input, q: Base, adapter: LoRA, bias: Bias | None = None) -> Output:
    r"""Apply the adapted layer: $y = x \hat W^T + b + s (x A^T) B^T$.

    $\hat W$ is the dequantized base: four bits are for storage, not for arithmetic.
    The product with $\hat W$ is computed in the dtype of x, the update in the dtype of
    A and B. Their sum is rounded once.

    Args:
        x: float32, float16 or `ml_dtypes.bfloat16`; the result has the same dtype.
        q: the base, from `blockwise.quantize` or `double_quant.quantize`.
        adapter: best in float32; 16 bits round small steps away.
        bias: of the base.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.

    Source: QLoRA (arXiv:2305.14314), equations 5 and 6.
    """
    check_shapes({"x": (x, "... in_features"), "bias": (bias, "? out_features")})
    rounded = None if bias is None else bias.astype(x.dtype)
    return lora.forward(x, dequantize(q, x.dtype), adapter, rounded).astype(x.dtype)


def backward(grad_y: Output, x: Input, q: Base, adapter: LoRA) -> LoRAGradients:
    r"""Return the gradients of x, A and B; the base is frozen and gets none.

    $\hat W$ is not stored but dequantized a second time for the gradient of x. That
    gradient has the dtype of x; the others have the dtypes of A and B.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype.

    Source: QLoRA (arXiv:2305.14314), section 3.
    """
    check_shapes({"x": (x, "... in_features")})
    grads = lora.backward(grad_y, x, dequantize(q, x.dtype), adapter)
    return grads._replace(x=grads.x.astype(x.dtype))


def merge(q: Base, adapter: LoRA) -> Weight:
    r"""Return the float32 weight with the same output: $W' = \hat W + s B A$.

    This is the function that was trained, in 32 bits a weight. (W + s B A avoids the
    rounding of $\hat W$, but the adapter was not trained on W.)

    Raises:
        InputError: if the adapter has another layer's shape.
    """
    return lora.merge(dequantize(q), adapter)


def requantize(q: Base, adapter: LoRA) -> Base:
    r"""Return a base of the same kind with nearly the same output: $q(\hat W + s B A)$.

    Where the update is smaller than half the distance of two codebook values, it is
    lost, but for the largest weight of each block, which sets the scale.

    Raises:
        InputError: if the adapter has another layer's shape.
    """
    W = merge(q, adapter)
    if isinstance(q, Blockwise):
        return blockwise.quantize(W, q.codebook, q.blocksize)
    return double_quant.quantize(W, q.codebook, q.blocksize, q.nested_blocksize)


def dequantize(q: Base, dtype: DTypeLike = np.float32) -> Weight:
    """Return the weight; the scales may be numbers or codes.

    Raises:
        InputError: if the parts of q do not fit each other.
    """
    check_kind("q", q, Blockwise, Nested)
    if isinstance(q, Nested):
        return double_quant.dequantize(q, dtype)
    return blockwise.dequantize(q, dtype)
