"""LoRA of experts in the torch column, on the plainest module that holds a stack."""

from typing import cast

import numpy as np
import torch

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch import lora
from minipeft.torch.experts import Experts, ExpertsLoRA, LoRAExperts, StackLoRA


def experts_forward(
    x: Array,
    chosen: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Array:
    """Return the output of each token's expert."""
    adapted = _adapted(W, A, B, lora_scaling(A, alpha, rank_stabilized), bias)
    return to_numpy(adapted(to_torch(x), to_torch(chosen)))


def experts_backward(
    grad_y: Array,
    x: Array,
    chosen: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, A and B."""
    adapted = _adapted(W, A, B, lora_scaling(A, alpha, rank_stabilized))
    leaf = to_torch(x).requires_grad_()
    y = adapted(leaf, to_torch(chosen))
    part = cast(StackLoRA, cast(ExpertsLoRA, adapted.adapters["default"])["W"])
    gradients = torch.autograd.grad(
        y, (leaf, part.A, part.B), to_torch(grad_y), materialize_grads=True
    )
    return to_numpy(gradients[0]), to_numpy(gradients[1]), to_numpy(gradients[2])


def experts_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """Return the stack of the merged experts."""
    adapted = _adapted(W, A, B, lora_scaling(A, alpha, rank_stabilized))
    return to_numpy(cast(Experts, adapted.merge().unload()).W)


def lora_scaling(A: Array, alpha: float, rank_stabilized: bool) -> float:
    """Return the scaling; r stands behind the axis of experts."""
    r = np.atleast_2d(A).shape[-2]
    return lora.scaling(alpha, r, rank_stabilized)


def _adapted(
    W: Array, A: Array, B: Array, scaling: float, bias: Array | None = None
) -> LoRAExperts:
    part = StackLoRA(to_torch(A), to_torch(B), scaling)
    base = Experts(to_torch(W), None if bias is None else to_torch(bias))
    return LoRAExperts(base, ExpertsLoRA({"W": part}))
