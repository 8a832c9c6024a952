"""HiRA in peft, which has no scaling: B carries it."""

from typing import Any

from peft import HiraConfig

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.peft.layers import (
    TARGET,
    adapted,
    gradients,
    layer_of,
    merged,
)
from minipeft.golden.tensors import Array


def hira_forward(
    x: Array, W: Array, A: Array, B: Array, scaling: float, bias: Array | None = None
) -> Array:
    """Return the output of the adapted layer."""
    return to_numpy(_layer(W, A, B, scaling, bias)(to_torch(x)))


def hira_backward(
    grad_y: Array, x: Array, W: Array, A: Array, B: Array, scaling: float
) -> tuple[Array, ...]:
    """Return the gradients of x, A and B."""
    layer = _layer(W, A, B, scaling)
    trained = [layer.hira_A["default"], layer.hira_B["default"]]
    grad_x, grad_A, grad_B = gradients(layer, grad_y, x, trained)
    return grad_x, grad_A, scaling * grad_B


def hira_merge(W: Array, A: Array, B: Array, scaling: float) -> Array:
    """Return the merged weight, as `merge()` leaves it."""
    return merged(_layer(W, A, B, scaling))


def _layer(
    W: Array, A: Array, B: Array, scaling: float, bias: Array | None = None
) -> Any:
    config = HiraConfig(r=A.shape[0], target_modules=TARGET)
    layer = layer_of(adapted(W, bias, config))
    layer.hira_A.load_state_dict({"default": to_torch(A)})
    layer.hira_B.load_state_dict({"default": scaling * to_torch(B)})
    return layer
