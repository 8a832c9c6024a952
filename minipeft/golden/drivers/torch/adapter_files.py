"""The settings of adapter files in the torch column: files are written, and merged."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import layer
from minipeft.golden.tensors import Array
from minipeft.interop import gguf_format, merging, peft_folder, peft_format
from minipeft.interop.adapter import Adapter
from minipeft.interop.tensors import About, SafeTensors, writing
from minipeft.torch.lora import LoRA, LoRALinear

PREFIX = peft_folder.PREFIX


def adapter_config_scaling(
    A: Array, B: Array, module: str, config: Mapping[str, Any]
) -> Array:
    """Return the factor of B A in a layer."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = _read(
            Path(folder, "adapter"), module, config, {"lora_A": A, "lora_B": B}
        )
    return np.array(adapter.updates[f"{module}.weight"].scaling, np.float32)


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
    """Return the merged weight and bias, as `minipeft merge` writes them."""
    parts = {"lora_A": A, "lora_B": B, "lora_B.bias": B_bias}
    parts["base_layer.bias"] = trained_bias
    names = {f"{module}.weight": W, f"{module}.bias": bias}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = _read(folder / "adapter", module, config, parts)
        _write(folder / "base" / "model.safetensors", names)
        merging.merge(folder / "base", adapter, folder / "merged")
        found = SafeTensors(folder / "merged" / "model.safetensors")
        merged, merged_bias = (to_numpy(found.read(tensor)) for tensor in names)
        return merged, merged_bias


def gguf_merge(W: Array, A: Array, B: Array, alpha: float, share: float) -> Array:
    """Return the weight with which llama.cpp computes."""
    s = gguf_format.scaling(alpha, len(A), share)
    adapted = LoRALinear(layer(W), LoRA(to_torch(A), to_torch(B), s))
    return to_numpy(adapted.merge().weight)


def _read(
    folder: Path,
    module: str,
    config: Mapping[str, Any],
    parts: Mapping[str, Array | None],
) -> Adapter:
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    tensors = {
        f"{PREFIX}{module}.{names.get(name, name)}": to_torch(part)
        for name, part in parts.items()
        if part is not None
    }
    whole = {**config, "peft_type": "LORA", "target_modules": [module]}
    peft_folder.write(folder, peft_folder.Contents(whole, tensors))
    return peft_format.read(folder)


def _write(path: Path, tensors: Mapping[str, Array]) -> None:
    held = {name: to_torch(tensor) for name, tensor in tensors.items()}
    about = {n: About(tensor.dtype, tuple(tensor.shape)) for n, tensor in held.items()}
    with writing(path, about, {"format": "pt"}) as writer:
        for name, tensor in held.items():
            writer.write(name, tensor)
