"""LoRA, DoRA, attention and MXFP4 in MLX. Packages: mlx-lm==0.32.2 mlx[cpu]==0.32.4."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from minipeft.golden.tensors import Array


def lora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Array:
    """`LoRALinear`, whose scale is a setting of its own."""
    r = len(A) ** 0.5 if rank_stabilized else len(A)
    return np.array(_layer(LoRALinear, W, A, B, alpha / r, bias)(mx.array(x)))


def lora_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """What `fuse` returns."""
    r = len(A) ** 0.5 if rank_stabilized else len(A)
    return np.array(_layer(LoRALinear, W, A, B, alpha / r).fuse().weight)


def dora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    magnitude: Array,
    alpha: float,
    bias: Array | None = None,
) -> Array:
    """`DoRALinear`."""
    layer = _layer(DoRALinear, W, A, B, alpha / len(A), bias, magnitude)
    return np.array(layer(mx.array(x)))


def dora_merge(W: Array, A: Array, B: Array, magnitude: Array, alpha: float) -> Array:
    """What `fuse` returns."""
    layer = _layer(DoRALinear, W, A, B, alpha / len(A), None, magnitude)
    return np.array(layer.fuse().weight)


def mxfp4_quantize(W: Array) -> tuple[Array, Array]:
    """`mlx.core.quantize`, whose words hold eight codes."""
    words, scales = mx.quantize(mx.array(np.atleast_2d(W)), mode="mxfp4")
    packed = np.array(words).view(np.uint8).reshape(*W.shape[:-1], -1)
    return packed, np.array(scales).reshape(*W.shape[:-1], -1)


def _layer(
    kind: Any,
    W: Array,
    A: Array,
    B: Array,
    scale: float,
    bias: Array | None = None,
    magnitude: Array | None = None,
) -> Any:
    if W.dtype.name == "bfloat16":
        raise NotImplementedError("MLX takes no bfloat16 from NumPy")
    base = nn.Linear(W.shape[1], len(W), bias=bias is not None)
    layer = kind.from_base(base, len(A), scale=scale)
    weights = {"linear.weight": W, "lora_a": A.T, "lora_b": B.T}
    held = {**weights, "linear.bias": bias, "m": magnitude}
    layer.load_weights([(k, mx.array(v)) for k, v in held.items() if v is not None])
    return layer
