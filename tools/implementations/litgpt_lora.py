"""LoRA in LitGPT. Packages: litgpt==0.5.13 transformers==4.57.6 torch==2.13.0."""

from typing import Any

import torch
from litgpt.lora import LoRALinear
from torch_layers import hold, lora

from minipeft.golden.tensors import Array


def layer(
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Any:
    """`LoRALinear`."""
    if rank_stabilized:
        raise NotImplementedError("LitGPT scales by alpha/r alone")
    made = LoRALinear(W.shape[1], len(W), len(A), alpha, bias=bias is not None)
    hold(made.linear, weight=W, bias=bias)
    hold(made, lora_A=A, lora_B=B)
    return made


def trained(made: Any) -> list[torch.Tensor]:
    """A and B."""
    return [made.lora_A, made.lora_B]


def merged(made: Any) -> torch.Tensor:
    """The weight after `merge()`."""
    made.merge()
    weight: torch.Tensor = made.linear.weight
    return weight


lora_forward, lora_backward, lora_merge = lora(layer, trained, merged)
