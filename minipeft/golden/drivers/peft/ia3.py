"""IA3 in peft."""

from typing import Any

from peft import IA3Config

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.peft.layers import (
    TARGET,
    adapted,
    gradients,
    layer_of,
    merged,
)
from minipeft.golden.tensors import Array


def ia3_forward(
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: str,
    bias: Array | None = None,
) -> Array:
    """Return the output of the rescaled layer."""
    return to_numpy(_layer(W, l, side, bias)(to_torch(x)))


def ia3_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    l: Array,  # noqa: E741
    side: str,
    bias: Array | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of x and l, which peft keeps as a matrix."""
    layer = _layer(W, l, side, bias)
    trained = [layer.ia3_l["default"]]
    grad_x, grad_l = gradients(layer, grad_y, x, trained)
    return grad_x, grad_l.reshape(-1)


def ia3_merge(W: Array, l: Array, side: str) -> Array:  # noqa: E741
    """Return the merged weight, as `merge()` leaves it."""
    return merged(_layer(W, l, side))


def _layer(
    W: Array,
    l: Array,  # noqa: E741
    side: str,
    bias: Array | None = None,
) -> Any:
    inputs = TARGET if side == "input" else []
    config = IA3Config(target_modules=TARGET, feedforward_modules=inputs)
    layer = layer_of(adapted(W, bias, config))
    scale = to_torch(l)[None] if side == "input" else to_torch(l)[:, None]
    layer.ia3_l.load_state_dict({"default": scale})
    return layer
