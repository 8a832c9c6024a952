"""QLoRA in the NumPy column, on NF4."""

from typing import Any

from minipeft.golden.tensors import Array
from minipeft.reference import lora, qlora
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import NF4
from minipeft.reference.lora import LoRA


def qlora_forward(
    x: Array,
    packed: Array,
    absmax: Array,
    A: Array,
    B: Array,
    alpha: float,
    blocksize: int,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    q = _base(packed, absmax, A, B, blocksize)
    return qlora.forward(x, q, _lora(A, B, alpha), bias)


def qlora_backward(
    grad_y: Array,
    x: Array,
    packed: Array,
    absmax: Array,
    A: Array,
    B: Array,
    alpha: float,
    blocksize: int,
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, A and B."""
    q = _base(packed, absmax, A, B, blocksize)
    gradients = qlora.backward(grad_y, x, q, _lora(A, B, alpha))
    return gradients.x, gradients.A, gradients.B


def qlora_requantize(
    packed: Array, absmax: Array, A: Array, B: Array, alpha: float, blocksize: int
) -> tuple[Array, Array]:
    """Return codes and scales of the merged weight."""
    q = _base(packed, absmax, A, B, blocksize)
    merged: Any = qlora.requantize(q, _lora(A, B, alpha))
    return merged.packed, merged.absmax


def _base(
    packed: Array, absmax: Array, A: Array, B: Array, blocksize: int
) -> Blockwise:
    return Blockwise(packed, absmax, NF4, blocksize, (B.shape[0], A.shape[1]))


def _lora(A: Array, B: Array, alpha: float) -> LoRA:
    return LoRA(A, B, lora.scaling(alpha, len(A)))
