"""VeRA in peft."""

from typing import Any

import numpy as np
from peft import VeraConfig

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.peft.layers import (
    TARGET,
    adapted,
    gradients,
    layer_of,
    merged,
)
from minipeft.golden.tensors import Array


def vera_projections(
    seed: int, r: int, in_features: int, out_features: int
) -> tuple[Array, Array]:
    """Return the shared pair."""
    config = VeraConfig(r=r, projection_prng_key=seed, target_modules=TARGET)
    W = np.zeros((out_features, in_features), np.float32)
    pair = adapted(W, None, config).base_model
    return to_numpy(pair.vera_A["default"]), to_numpy(pair.vera_B["default"])


def vera_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    d: Array,
    b: Array,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    return to_numpy(_layer(W, A, B, d, b, bias)(to_torch(x)))


def vera_backward(
    grad_y: Array, x: Array, W: Array, A: Array, B: Array, d: Array, b: Array
) -> tuple[Array, ...]:
    """Return the gradients of x, d and b."""
    layer = _layer(W, A, B, d, b)
    trained = [part["default"] for part in (layer.vera_lambda_d, layer.vera_lambda_b)]
    return gradients(layer, grad_y, x, trained)


def vera_merge(W: Array, A: Array, B: Array, d: Array, b: Array) -> Array:
    """Return the merged weight, as `merge()` leaves it."""
    return merged(_layer(W, A, B, d, b))


def _layer(
    W: Array, A: Array, B: Array, d: Array, b: Array, bias: Array | None = None
) -> Any:
    config = VeraConfig(r=A.shape[0], target_modules=TARGET)
    layer = layer_of(adapted(W, bias, config))
    # A pair larger than the layer comes from a model with larger layers.
    layer.vera_A["default"], layer.vera_B["default"] = to_torch(A), to_torch(B)
    layer.vera_lambda_d.load_state_dict({"default": to_torch(d)})
    layer.vera_lambda_b.load_state_dict({"default": to_torch(b)})
    return layer
