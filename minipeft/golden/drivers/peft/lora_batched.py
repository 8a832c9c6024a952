"""A mixed batch in peft: `adapter_names` names the adapter of each row."""

from typing import Any

import torch
from peft import LoraConfig

from minipeft.golden.arguments import NO_ADAPTER
from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.peft.layers import TARGET, adapted, layer_of
from minipeft.golden.tensors import Array


def lora_batched_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    scaling: Array,
    indices: Array,
    bias: Array | None = None,
) -> Array:
    """Return the output, each request with its own adapter."""
    model: Any = None
    for i, parts in enumerate(zip(A, B, scaling.tolist(), strict=True)):
        r = len(parts[0])
        config = LoraConfig(r=r, lora_alpha=parts[2] * r, target_modules=TARGET)
        model = model or adapted(W, bias, config)
        model.add_adapter(f"{i}", config)
        layer = layer_of(model)
        layer.lora_A[f"{i}"].load_state_dict({"weight": to_torch(parts[0])})
        layer.lora_B[f"{i}"].load_state_dict({"weight": to_torch(parts[1])})
    names = ["__base__" if i == NO_ADAPTER else str(i) for i in indices.tolist()]
    with torch.no_grad():
        return to_numpy(model.eval()(to_torch(x), adapter_names=names))
