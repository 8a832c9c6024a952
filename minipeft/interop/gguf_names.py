"""The names of llama.cpp for a model's tensors, and its order of rows in q and k.

The names are those of the package `gguf`. Only families are listed whose weights
llama.cpp stores as they are, but for the rows of q and k in the family `llama`: it
rotates neighbouring pairs where transformers rotates halves.
"""

from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from minipeft.errors import InputError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
PARTS = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")


def family(config: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a model's architecture.

    Raises:
        InputError: the architecture is not one that can be written.
    """
    kinds = config.get("architectures") or ["no class"]
    if kinds[0] not in FAMILIES:
        raise InputError(
            f"config.json names {kinds[0]}, which cannot be written as GGUF here, only "
            f"{', '.join(FAMILIES)}; export safetensors, and convert them with "
            "llama.cpp's own script"
        )
    return FAMILIES[kinds[0]]


def names(arch: str, layers: int) -> dict[str, str]:
    """Return {name in transformers: name in GGUF} of every tensor that may occur."""
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(kind, layers)
    modules = [*OUTSIDE]
    modules += [f"model.layers.{i}.{part}" for i in range(layers) for part in PARTS]
    found = {}
    for module in modules:
        theirs = table.get_name(module)
        if theirs is not None:
            for end in (".weight", ".bias"):
                found[module + end] = theirs + end
    return found


def heads_turned(name: str, arch: str, config: Mapping[str, Any]) -> int:
    """Return the number of heads whose rows llama.cpp reorders, or 0."""
    if arch != "llama":
        return 0
    heads = int(config["num_attention_heads"])
    if ".q_proj." in name:
        return heads
    return int(config.get("num_key_value_heads") or heads) if ".k_proj." in name else 0


def turn(rows: Tensor, heads: int) -> Tensor:
    """Interleave the two halves of each head's rows: llama.cpp's order."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def turn_back(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo `turn`."""
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
