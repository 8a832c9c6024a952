"""LoRA and DoRA in LyCORIS. Packages: lycoris-lora==4.1.3 torch==2.13.0."""

from typing import Any

import torch
from lycoris.modules.locon import LoConModule
from torch_layers import dora, hold, lora

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
    """`LoConModule`; with a magnitude its `weight_decompose`, by rows."""
    base = torch.nn.Linear(W.shape[1], len(W), bias=bias is not None)
    hold(base, weight=W, bias=bias)
    made = LoConModule(
        "one",
        base,
        lora_dim=len(A),
        alpha=alpha,
        rs_lora=rank_stabilized,
        weight_decompose=magnitude is not None,
        wd_on_out=True,
    )
    hold(made.lora_down, weight=A)
    hold(made.lora_up, weight=B)
    hold(made, dora_scale=None if magnitude is None else magnitude[:, None])
    return made


def trained(made: Any) -> list[torch.Tensor]:
    """A, B and the magnitude, as the layer keeps them."""
    magnitude = [made.dora_scale] if made.wd else []
    return [made.lora_down.weight, made.lora_up.weight, *magnitude]


def merged(made: Any) -> torch.Tensor:
    """The weight of the layer after `merge_to`."""
    made.merge_to()
    weight: torch.Tensor = made.org_module[0].weight
    return weight


def dora_backward(**arguments: Array | float) -> tuple[Array, ...]:
    """The gradients; that of the magnitude is a column there."""
    *rest, column = _dora_backward(**arguments)
    return *rest, column[:, 0].copy()


lora_forward, lora_backward, lora_merge = lora(layer, trained, merged)
dora_forward, _dora_backward, dora_merge = dora(layer, trained, merged)
