"""LoRA in peft: an adapter on one `nn.Linear`."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from minipeft.golden.drivers.bridge import to_numpy, to_torch
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
    layer = _layer(W, bias, LoraConfig(**_settings(A, alpha, rank_stabilized)))
    _load(layer, A, B)
    return to_numpy(layer(to_torch(x)))


def lora_backward(
    grad_y: Array,
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
) -> tuple[Array, Array, Array]:
    """Return the gradients of x, A and B."""
    layer = _layer(W, None, LoraConfig(**_settings(A, alpha, rank_stabilized)))
    _load(layer, A, B)
    leaf = to_torch(x).requires_grad_()
    layer(leaf).backward(to_torch(grad_y))
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    gradients = [to_numpy(tensor.grad) for tensor in (leaf, *trained)]
    return gradients[0], gradients[1], gradients[2]


def lora_merge(
    W: Array, A: Array, B: Array, alpha: float, rank_stabilized: bool
) -> Array:
    """Return the merged weight, as `merge()` leaves it."""
    layer = _layer(W, None, LoraConfig(**_settings(A, alpha, rank_stabilized)))
    _load(layer, A, B)
    layer.merge()
    return to_numpy(layer.base_layer.weight)


def _settings(A: Array, alpha: float, rank_stabilized: bool) -> dict[str, Any]:
    return {
        "r": A.shape[0],
        "lora_alpha": alpha,
        "use_rslora": rank_stabilized,
        "target_modules": ["0"],
    }


def _layer(W: Array, bias: Array | None, config: LoraConfig) -> Any:
    out_features, in_features = W.shape
    base = nn.Linear(in_features, out_features, bias=bias is not None)
    base = base.to(to_torch(W).dtype)
    state = {"weight": to_torch(W)}
    base.load_state_dict(state if bias is None else state | {"bias": to_torch(bias)})
    model: Any = get_peft_model(nn.Sequential(base), config)
    return model.base_model.model[0]


def _load(layer: Any, A: Array, B: Array) -> None:
    with torch.no_grad():
        layer.lora_A.load_state_dict({"default.weight": to_torch(A)})
        layer.lora_B.load_state_dict({"default.weight": to_torch(B)})
