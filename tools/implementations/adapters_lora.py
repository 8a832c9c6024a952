"""LoRA and bottlenecks in AdapterHub. Packages: adapters==1.3.0 torch==2.13.0."""

from typing import Any

import torch
from adapters import LoRAConfig, SeqBnConfig
from adapters.methods.lora import LoRA
from adapters.methods.modeling import Adapter
from torch_layers import hold, lora

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array


class Layer(torch.nn.Module):
    """A linear layer, and what is composed with its output."""

    def __init__(self, W: Array, bias: Array | None, part: Any) -> None:
        super().__init__()
        self.part = part
        self.base = torch.nn.Linear(W.shape[1], len(W), bias=bias is not None)
        hold(self.base, weight=W, bias=bias)

    def forward(self, x: torch.Tensor) -> Any:
        """Compose as the library's own layers do."""
        added, _ = self.part(None, x)
        return self.part.com(self.base(x), added, scaling=1.0)


def layer(
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Any:
    """`LoRA` on a linear layer."""
    if rank_stabilized:
        raise NotImplementedError("adapters scales by alpha/r alone")
    shapes = (len(A), W.shape[1]), (len(W), len(A))
    part = LoRA(*shapes, LoRAConfig(r=len(A), alpha=alpha))
    hold(part, lora_A=A, lora_B=B)
    return Layer(W, bias, part)


def trained(made: Any) -> list[torch.Tensor]:
    """A and B."""
    return [made.part.lora_A, made.part.lora_B]


def merged(made: Any) -> torch.Tensor:
    """What `merge_adapter` composes."""
    weight: torch.Tensor = made.part.com(made.base.weight, made.part.delta_w)
    return weight


lora_forward, lora_backward, lora_merge = lora(layer, trained, merged)


def bottleneck_forward(
    x: Array, down: Array, down_bias: Array, up: Array, up_bias: Array, scaling: float
) -> Array:
    """`Adapter` without its residual connection."""
    config = SeqBnConfig(scaling=float(scaling))
    adapter = Adapter("one", down.shape[1], len(down), config)
    hold(adapter.adapter_down[0], weight=down, bias=down_bias)
    hold(adapter.adapter_up, weight=up, bias=up_bias)
    given = to_torch(x)
    return to_numpy(adapter(given, torch.zeros_like(given))[2])
