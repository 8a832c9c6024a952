"""PiSSA in peft: `init_lora_weights="pissa"`, a full singular value decomposition."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from peft import LoraConfig
from safetensors.torch import load_file

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.peft.layers import TARGET, adapted, layer_of
from minipeft.golden.tensors import Array


def pissa_init(W: Array, r: int, alpha: float) -> tuple[Array, Array]:
    """Return what is left of W, and the first update."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, init_lora_weights="pissa", target_modules=TARGET
    )
    layer = layer_of(adapted(W, None, config))
    return to_numpy(layer.base_layer.weight), to_numpy(
        layer.get_delta_weight("default")
    )


def pissa_to_lora(A: Array, B: Array, A_0: Array, B_0: Array) -> tuple[Array, Array]:
    """`save_pretrained` with `path_initial_model_for_weight_conversion`."""
    config = LoraConfig(r=len(A), init_lora_weights="pissa", target_modules=TARGET)
    W = np.eye(len(B), A.shape[1], dtype=np.float32)  # any: the parts are replaced
    model = adapted(W, None, config)
    with TemporaryDirectory() as folder:
        start = Path(folder, "start")
        _hold(model, A_0, B_0)
        plain = model.peft_config["default"]
        plain.init_lora_weights = True  # of what is loaded again
        model.save_pretrained(start)
        plain.init_lora_weights = "pissa"
        _hold(model, A, B)
        model.save_pretrained(
            folder, path_initial_model_for_weight_conversion=str(start)
        )
        saved = load_file(Path(folder, "adapter_model.safetensors"))
    parts = (saved[f"base_model.model.0.lora_{part}.weight"] for part in "AB")
    A, B = (to_numpy(part) for part in parts)
    return A, B


def _hold(model: Any, A: Array, B: Array) -> None:
    layer = layer_of(model)
    layer.lora_A.load_state_dict({"default.weight": to_torch(A)})
    layer.lora_B.load_state_dict({"default.weight": to_torch(B)})
