"""LoRA and DoRA in torchtune. Packages: torchtune==0.6.1 torchao==0.13.0."""

from typing import Any

import torch
from torch_layers import dora, hold, lora
from torchtune.modules import peft

from minipeft.golden.tensors import Array


def layer(
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
    magnitude: Array | None = None,
) -> Any:
    """`LoRALinear`, or with a magnitude `DoRALinear`."""
    if rank_stabilized:
        raise NotImplementedError("torchtune scales by alpha/r alone")
    kind = peft.LoRALinear if magnitude is None else peft.DoRALinear
    made = kind(W.shape[1], len(W), len(A), alpha, use_bias=bias is not None)
    hold(made, weight=W, bias=bias, magnitude=magnitude)
    hold(made.lora_a, weight=A)
    hold(made.lora_b, weight=B)
    made.of_merging = len(A), alpha
    return made


def trained(made: Any) -> list[torch.Tensor]:
    """A, B and the magnitude."""
    magnitude = [made.magnitude] if hasattr(made, "magnitude") else []
    return [made.lora_a.weight, made.lora_b.weight, *magnitude]


def merged(made: Any) -> torch.Tensor:
    """What `get_merged_lora_ckpt` writes into a checkpoint."""
    state = {f"one.{name}": value for name, value in made.state_dict().items()}
    weight: torch.Tensor = peft.get_merged_lora_ckpt(state, *made.of_merging)[
        "one.weight"
    ]
    return weight


lora_forward, lora_backward, lora_merge = lora(layer, trained, merged)
dora_forward, dora_backward, dora_merge = dora(layer, trained, merged)
