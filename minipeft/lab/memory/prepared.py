"""Every method of the formulas on a real model, and one measured step of it."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from minipeft.lab.memory.measured import predicted
from minipeft.lab.memory.rows import Adapter
from minipeft.lab.memory.shapes import LINEARS
from minipeft.lab.memory.training import Peak
from minipeft.lab.memory_peak import held, watched
from minipeft.lab.models import recompute_blocks
from minipeft.lab.train import TrainConfig, adamw
from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.hira import HiRAConfig
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import Config, inject, trainable_parameters
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.miss import MiSSConfig
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import quantize_linears
from minipeft.torch.vera import VeRAConfig

R, TOKENS = 8, 10
CONFIGS: Mapping[str, Config] = {
    "lora": LoRAConfig(R, 16),
    "rslora": LoRAConfig(R, 16, rank_stabilized=True),
    "qlora": LoRAConfig(R, 16),
    "dora": DoRAConfig(R, 16),
    "pissa": PiSSAConfig(R, 16),
    "loftq": LoftQConfig(R, 16, steps=1),
    "hira": HiRAConfig(R),
    "miss": MiSSConfig(R),
    "vera": VeRAConfig(R),
    "ia3": IA3Config(("down_proj",)),
    "bottleneck": BottleneckConfig(R),
}
PLACES = {
    "ia3": ("k_proj", "v_proj", "down_proj"),
    "bottleneck": ("o_proj", "down_proj"),
}
NAMES = ("full", *CONFIGS, "prefix", "prompt")


def prepared(model: Any, name: str) -> Any:
    """Return the model ready to train by this method; changed in place."""
    if name == "full":
        return model.requires_grad_(True)
    if name == "prefix":
        return PrefixModel(model, PrefixConfig(TOKENS))
    if name == "prompt":
        return PromptModel(model, PromptConfig(TOKENS))
    if name == "qlora":
        quantize_linears(model)
    return inject(model, CONFIGS[name], PLACES.get(name, LINEARS))


def adapter(name: str) -> Adapter | None:
    """Return the formulas' words for a method here."""
    if name == "full":
        return None
    r = TOKENS if name in ("prefix", "prompt") else R
    return Adapter(r, method={"qlora": "lora"}.get(name, name))


def measured_peak(
    config: Any, name: str, tokens: tuple[int, int], checkpointing: bool = False
) -> tuple[int, Peak]:
    """Train a random Llama for a step; return its peak, measured and predicted.

    Args:
        config: of the Llama, of which only the sizes count.
        name: of the method, one of `NAMES`.
        tokens: batch size, sequence length.
        checkpointing: whether blocks are computed again in the backward pass.

    Returns:
        bytes, and the prediction.
    """
    base = transformers.LlamaForCausalLM(config).float()
    model = prepared(base, name).train()
    if checkpointing:
        recompute_blocks(base)
    optimizer = adamw(model, TrainConfig(1))
    ids = torch.randint(3, config.vocab_size, tokens)
    batch = {"input_ids": ids, "labels": ids}
    for parameter in trainable_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the states, without a pass through the model
    optimizer.zero_grad()
    expected = predicted(model, optimizer, batch)
    assert expected is not None
    before = held(model, optimizer)
    with watched() as found:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trainable_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return before + found[0], expected
