"""LoRA in peft where a model has two adapters, or two layers with one weight."""

from typing import Any

import numpy as np
from peft import LoraConfig, get_peft_model
from torch import nn

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.peft.layers import TARGET, adapted, layer_of
from minipeft.golden.tensors import Array


def lora_weighted_sum(
    A: Array,
    B: Array,
    other_A: Array,
    other_B: Array,
    alpha: float,
    other_alpha: float,
    weight: float,
    other_weight: float,
) -> Array:
    """`add_weighted_adapter` with `combination_type="cat"`, which adds no product."""
    W = np.zeros((len(B), A.shape[1]), np.float32)
    model: Any = None
    for name, a, b, s in (
        ("one", A, B, alpha),
        ("other", other_A, other_B, other_alpha),
    ):
        config = LoraConfig(r=len(a), lora_alpha=s, target_modules=TARGET)
        model = model or adapted(W, None, config)
        model.add_adapter(name, config)
        layer_of(model).lora_A[name].load_state_dict({"weight": to_torch(a)})
        layer_of(model).lora_B[name].load_state_dict({"weight": to_torch(b)})
    weights = [weight, other_weight]
    model.add_weighted_adapter(["one", "other"], weights, "sum", "cat")
    return to_numpy(layer_of(model).get_delta_weight("sum"))


def lora_merge_tied(
    E: Array, A: Array, B: Array, alpha: float, layer: str
) -> tuple[Array, Array]:
    """Return both weights after `merge_and_unload` of a model that shares them."""
    head = nn.Linear(E.shape[1], len(E), bias=False)
    embedding = nn.Embedding(*E.shape)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    head.weight = embedding.weight
    head.load_state_dict({"weight": to_torch(E)})
    config = LoraConfig(r=len(A), lora_alpha=alpha, target_modules=[layer])
    tuned = get_peft_model(model, config)
    own = tuned.get_submodule(f"base_model.model.{layer}")
    if layer == "head":
        own.lora_A.load_state_dict({"default.weight": to_torch(A)})
        own.lora_B.load_state_dict({"default.weight": to_torch(B)})
    else:
        own.lora_embedding_A.load_state_dict({"default": to_torch(B.T.copy())})
        own.lora_embedding_B.load_state_dict({"default": to_torch(A.T.copy())})
    plain = tuned.merge_and_unload()
    return to_numpy(plain["embedding"].weight), to_numpy(plain["head"].weight)
