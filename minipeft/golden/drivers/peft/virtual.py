"""A model around which peft puts virtual tokens; it shows what peft hands to it."""

from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

from minipeft.golden.drivers.bridge import DEVICE

TASK = "FEATURE_EXTRACTION"


class Shown(nn.Module):
    """A model of one layer that returns its embedded text and its cache."""

    device = torch.device(DEVICE)

    def __init__(self, E: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(E), E.shape[1], _weight=E)
        self.config = PretrainedConfig(
            vocab_size=len(E),
            hidden_size=E.shape[1],
            num_hidden_layers=1,
            num_attention_heads=1,
        )

    def forward(
        self, inputs_embeds: torch.Tensor, past_key_values: Any = None, **_: Any
    ) -> tuple[torch.Tensor, Any]:
        """Return both."""
        return inputs_embeds, past_key_values


def around(E: torch.Tensor, config: PeftConfig) -> Any:
    """Return peft's model around one with this table of embeddings."""
    return get_peft_model(Shown(E), config)
