"""What peft makes of its own settings, in a model with a layer of that name."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array

PREFIX = "base_model.model."


def adapter_config_scaling(
    A: Array, B: Array, module: str, config: Mapping[str, Any]
) -> Array:
    """Return the factor of B A in the layer."""
    W = np.zeros((len(B), A.shape[1]), np.float32)
    if config.get("fan_in_fan_out"):
        W = W.T.copy()
    plain = {**config, "bias": "none", "lora_bias": False}
    layer = _layer(W, np.zeros(len(B), np.float32), module, plain, _parts(module, A, B))
    return np.array(layer.scaling["default"], np.float32)


def adapter_config_merge(
    W: Array,
    bias: Array,
    A: Array,
    B: Array,
    module: str,
    config: Mapping[str, Any],
    B_bias: Array | None = None,
    trained_bias: Array | None = None,
) -> tuple[Array, Array]:
    """Return the merged weight and bias, as `merge()` leaves them."""
    parts = _parts(module, A, B)
    if B_bias is not None:
        parts[f"{PREFIX}{module}.lora_B.bias"] = to_torch(B_bias)
    if trained_bias is not None:
        parts[f"{PREFIX}{module}.base_layer.bias"] = to_torch(trained_bias)
    layer = _layer(W, bias, module, config, parts)
    layer.merge()
    return to_numpy(layer.base_layer.weight), to_numpy(layer.base_layer.bias)


def _parts(module: str, A: Array, B: Array) -> dict[str, Tensor]:
    key = f"{PREFIX}{module}.lora_"
    return {f"{key}A.weight": to_torch(A), f"{key}B.weight": to_torch(B)}


def _layer(
    W: Array,
    bias: Array,
    module: str,
    config: Mapping[str, Any],
    parts: Mapping[str, Tensor],
) -> Any:
    rows, columns = W.shape
    turned = config.get("fan_in_fan_out")
    base: Any = Conv1D(columns, rows) if turned else nn.Linear(columns, rows)
    base.load_state_dict({"weight": to_torch(W), "bias": to_torch(bias)})
    model: nn.Module = base
    for name in reversed(module.split(".")):
        model = nn.ModuleDict({name: model})
    adapted = get_peft_model(model, LoraConfig(**config, target_modules=[module]))
    set_peft_model_state_dict(adapted, dict(parts))
    return adapted.get_submodule(f"{PREFIX}{module}")
