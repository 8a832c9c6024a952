"""LoRA and AdamW in Keras. Packages: keras==3.15.1 jax==0.10.2."""

import os
from typing import Any

import numpy as np

os.environ["KERAS_BACKEND"] = "jax"

import keras

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
    """`Dense` with `enable_lora`."""
    if x.ndim < 2:
        raise NotImplementedError("Dense takes no vector")
    return np.asarray(_layer(W, A, B, alpha, rank_stabilized, bias)(x))


def lora_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """Its kernel, with the update in it."""
    return np.asarray(_layer(W, A, B, alpha, rank_stabilized).kernel).T.copy()


def adamw_step(
    W: Array,
    grad: Array,
    m: Array,
    v: Array,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Array, Array, Array]:
    """One step of `keras.optimizers.AdamW` from a state that is handed in."""
    make = keras.optimizers.AdamW
    optimizer = make(lr, weight_decay, beta_1=beta1, beta_2=beta2, epsilon=eps)
    weight = keras.Variable(W)
    optimizer.build([weight])
    first, second = optimizer._momentums[0], optimizer._velocities[0]
    first.assign(m)
    second.assign(v)
    optimizer.iterations.assign(t)
    optimizer.apply([keras.ops.convert_to_tensor(grad)])
    return np.asarray(weight), np.asarray(first), np.asarray(second)


def _layer(
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Any:
    if rank_stabilized:
        raise NotImplementedError("Keras scales by alpha/r alone")
    layer = keras.layers.Dense(len(W), use_bias=bias is not None, dtype=W.dtype.name)
    layer.build((None, W.shape[1]))
    layer.enable_lora(len(A), lora_alpha=alpha)
    layer._kernel.assign(W.T)
    layer.lora_kernel_a.assign(A.T)
    layer.lora_kernel_b.assign(B.T)
    if bias is not None:
        layer.bias.assign(bias)
    return layer
