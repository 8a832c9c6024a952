"""QLoRA in the torch column, on NF4, with autograd for the gradients."""

from typing import cast

import torch

from minipeft.golden.drivers.bridge import DEVICE, to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch import lora, qlora
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import NF4
from minipeft.torch.lora import LoRA, LoRALinear
from minipeft.torch.qlora import QuantizedLinear


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
    layer = _layer(packed, absmax, A, B, (alpha, blocksize), bias)
    return to_numpy(layer(to_torch(x)))


def qlora_backward(
    grad_y: Array,
    x: Array,
    packed: Array,
    absmax: Array,
    A: Array,
    B: Array,
    alpha: float,
    blocksize: int,
) -> tuple[Array, ...]:
    """Return the gradients of x, A and B."""
    layer = _layer(packed, absmax, A, B, (alpha, blocksize))
    leaf = to_torch(x).requires_grad_()
    wanted = [leaf, *layer.adapters.parameters()]  # x, A, B
    gradients = torch.autograd.grad(layer(leaf), wanted, to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in gradients)


def qlora_requantize(
    packed: Array, absmax: Array, A: Array, B: Array, alpha: float, blocksize: int
) -> tuple[Array, Array]:
    """Return codes and scales of the merged weight."""
    layer = _layer(packed, absmax, A, B, (alpha, blocksize))
    q = qlora.requantize(layer).q
    return to_numpy(q.packed), to_numpy(cast(Blockwise, q).absmax)


def _layer(
    packed: Array,
    absmax: Array,
    A: Array,
    B: Array,
    numbers: tuple[float, int],
    bias: Array | None = None,
) -> LoRALinear:
    alpha, blocksize = numbers
    shape = (B.shape[0], A.shape[1])
    q = Blockwise(to_torch(packed), to_torch(absmax), NF4.to(DEVICE), blocksize, shape)
    base = QuantizedLinear(q, None if bias is None else to_torch(bias))
    return LoRALinear(base, LoRA(to_torch(A), to_torch(B), lora.scaling(alpha, len(A))))
