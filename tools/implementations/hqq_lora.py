"""LoRA in HQQ, on a plain layer. Packages: hqq==0.2.8.post1 torch==2.13.0."""

from typing import Any

import torch
from hqq.core.peft import HQQLinearLoRA
from torch_layers import hold, lora

from minipeft.golden.tensors import Array


def layer(
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Any:
    """`HQQLinearLoRA`, which keeps both factors transposed."""
    if rank_stabilized:
        raise NotImplementedError("HQQ scales by alpha/r alone")
    base: Any = torch.nn.Linear(W.shape[1], len(W), bias=bias is not None)
    hold(base, weight=W, bias=bias)
    base.compute_dtype = base.weight.dtype
    made = HQQLinearLoRA(base, {"r": len(A), "lora_alpha": alpha})
    hold(made, lora_A=A.T, lora_B=B.T)
    return made


def trained(made: Any) -> list[torch.Tensor]:
    """A and B."""
    return [made.lora_A, made.lora_B]


def lora_backward(**arguments: Array | float) -> tuple[Array, ...]:
    """The gradients, those of the factors transposed back."""
    grad_x, grad_A, grad_B = _lora_backward(**arguments)
    return grad_x, grad_A.T.copy(), grad_B.T.copy()


# Merging in HQQ quantizes, so there is nothing to compare.
lora_forward, _lora_backward, _ = lora(layer, trained, torch.Tensor)
