"""MiSS in peft, as its own default initializes it: one matrix for all shards."""

from typing import Any

from peft import MissConfig

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.peft.layers import (
    TARGET,
    adapted,
    gradients,
    layer_of,
    merged,
)
from minipeft.golden.tensors import Array


def miss_forward(x: Array, W: Array, D: Array, bias: Array | None = None) -> Array:
    """Return the output of the adapted layer."""
    return to_numpy(_layer(W, D, bias)(to_torch(x)))


def miss_backward(grad_y: Array, x: Array, W: Array, D: Array) -> tuple[Array, ...]:
    """Return the gradients of x and D."""
    layer = _layer(W, D)
    return gradients(layer, grad_y, x, [layer.miss_block["default"]])


def miss_merge(W: Array, D: Array) -> Array:
    """Return the merged weight, as `merge()` leaves it."""
    return merged(_layer(W, D))


def _layer(W: Array, D: Array, bias: Array | None = None) -> Any:
    config = MissConfig(r=D.shape[0], target_modules=TARGET)
    layer = layer_of(adapted(W, bias, config))
    layer.miss_block.load_state_dict({"default": to_torch(D)})
    return layer
