"""DoRA in peft: `LoraConfig(use_dora=True)`."""

from typing import Any

from peft import LoraConfig

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.peft.layers import (
    TARGET,
    adapted,
    gradients,
    layer_of,
    merged,
)
from minipeft.golden.tensors import Array


def dora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    magnitude: Array,
    alpha: float,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    return to_numpy(_layer(W, A, B, magnitude, alpha, bias)(to_torch(x)))


def dora_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    magnitude: Array,
    alpha: float,
) -> tuple[Array, ...]:
    """Return the gradients of x, A, B and the magnitude."""
    layer = _layer(W, A, B, magnitude, alpha)
    parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    trained = [part["default"].weight for part in parts]
    return gradients(layer, grad_y, x, trained)


def dora_merge(W: Array, A: Array, B: Array, magnitude: Array, alpha: float) -> Array:
    """Return the merged weight, as `merge()` leaves it."""
    return merged(_layer(W, A, B, magnitude, alpha))


def _layer(
    W: Array,
    A: Array,
    B: Array,
    magnitude: Array,
    alpha: float,
    bias: Array | None = None,
) -> Any:
    config = LoraConfig(
        r=A.shape[0], lora_alpha=alpha, use_dora=True, target_modules=TARGET
    )
    layer = layer_of(adapted(W, bias, config))
    layer.lora_A.load_state_dict({"default.weight": to_torch(A)})
    layer.lora_B.load_state_dict({"default.weight": to_torch(B)})
    state = {"default.weight": to_torch(magnitude)}
    layer.lora_magnitude_vector.load_state_dict(state)
    return layer
