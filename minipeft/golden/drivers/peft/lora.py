"""LoRA in peft: an adapter on one `nn.Linear`."""

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
from minipeft.golden.drivers.peft.lora_models import (
    lora_merge_tied as lora_merge_tied,
)
from minipeft.golden.drivers.peft.lora_models import (
    lora_weighted_sum as lora_weighted_sum,
)
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
    """Return the output of the adapted layer."""
    layer = _layer(W, A, B, alpha, rank_stabilized, bias)
    return to_numpy(layer(to_torch(x)))


def lora_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
) -> tuple[Array, ...]:
    """Return the gradients of x, A and B."""
    layer = _layer(W, A, B, alpha, rank_stabilized)
    trained = [part["default"].weight for part in (layer.lora_A, layer.lora_B)]
    return gradients(layer, grad_y, x, trained)


def lora_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """Return the merged weight, as `merge()` leaves it."""
    return merged(_layer(W, A, B, alpha, rank_stabilized))


def _layer(
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Any:
    config = LoraConfig(
        r=A.shape[0],
        lora_alpha=alpha,
        use_rslora=rank_stabilized,
        target_modules=TARGET,
    )
    layer = layer_of(adapted(W, bias, config))
    layer.lora_A.load_state_dict({"default.weight": to_torch(A)})
    layer.lora_B.load_state_dict({"default.weight": to_torch(B)})
    return layer
