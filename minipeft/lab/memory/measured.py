"""What a model in memory is, in the terms of the formulas: a prediction of its peak."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.lab.memory.configs import of_config
from minipeft.lab.memory.rows import Adapter
from minipeft.lab.memory.shapes import Architecture
from minipeft.lab.memory.training import Peak, Precision, Step, peak
from minipeft.lab.memory_peak import held, watched
from minipeft.torch.adamw import AdamW
from minipeft.torch.bottleneck import Serial
from minipeft.torch.dora import DoRALinear
from minipeft.torch.hira import HiRALinear
from minipeft.torch.ia3 import IA3Linear
from minipeft.torch.inject import adapted, trainable_parameters
from minipeft.torch.loftq import LoftQLinear
from minipeft.torch.lora import LoRALinear
from minipeft.torch.miss import MiSSLinear
from minipeft.torch.paged import PagedAdamW
from minipeft.torch.pissa import PiSSALinear
from minipeft.torch.prefix import PrefixModel
from minipeft.torch.prompt import PromptModel
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.vera import VeRALinear
from minipeft.torch.virtual import VirtualTokens

Rank = Callable[[Any], int]

LAYERS: Mapping[type[nn.Module], tuple[str, Rank]] = {
    LoRALinear: ("lora", lambda a: len(a.A)),
    LoftQLinear: ("loftq", lambda a: len(a.A)),
    DoRALinear: ("dora", lambda a: len(a.A)),
    PiSSALinear: ("pissa", lambda a: len(a.A)),
    HiRALinear: ("hira", lambda a: len(a.A)),
    VeRALinear: ("vera", lambda a: len(a.d)),
    MiSSLinear: ("miss", lambda a: len(a.D)),
    IA3Linear: ("ia3", lambda _: 1),
    Serial: ("bottleneck", lambda a: len(a.down)),
}
"""The method of each adapted layer, and where its rank is read."""


class StepMemory(NamedTuple):
    """The peak of a step in bytes; predicted None: no formula knows the model."""

    measured: float
    predicted: float | None

    def __str__(self) -> str:
        line = f"peak memory of a step: measured {self.measured / 1e6:,.1f} MB, "
        if self.predicted is None:
            return f"{line}predicted by no formula: they know another model or method"
        off = self.measured / self.predicted - 1
        return f"{line}predicted {self.predicted / 1e6:,.1f} MB ({off:+.1%})"


@contextmanager
def step_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    accumulate: int = 1,
) -> Iterator[list[StepMemory]]:
    """Say of the step taken inside what peak was predicted and what was measured.

    Args:
        model: with its adapters.
        optimizer: that has taken a step before.
        batch: what the model is called with.
        accumulate: batches whose gradients add up in the step.

    Yields:
        a list that holds both, once the block is left.
    """
    expected = predicted(model, optimizer, batch, accumulate)
    device = str(next(model.parameters()).device)
    before = held(model, optimizer)
    said: list[StepMemory] = []
    with watched(device) as found:
        yield said
    total = None if expected is None else expected.total
    said.append(StepMemory(before + found[0], total))


def predicted(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    accumulate: int = 1,
) -> Peak | None:
    """Return the peak of a step of this model, or None where no formula is of it.

    Weights are counted as they lie in memory; masks of dropout are not counted.

    Args:
        model: with its adapters.
        optimizer: of its trainable parameters.
        batch: what the model is called with.
        accumulate: batches whose gradients add up in the step.
    """
    base: Any = model.model if isinstance(model, VirtualTokens) else model
    try:
        sizes = of_config(base.config)
        adapter = adapter_of(model, sizes)
        rows, columns = batch["input_ids"].shape
    except (InputError, AttributeError, KeyError):
        return None
    own = base.get_input_embeddings().weight.element_size()
    short = next(iter(trainable_parameters(model))).element_size()
    states, transient = _optimizer(optimizer, short)
    quantized = any(isinstance(m, QuantizedLinear) for m in model.modules())
    use = Precision(0.5 if quantized else own, short, states, own, own)
    how = _attention(base, batch), _checkpoints(base), transient
    step = Step(*how, accumulates=accumulate > 1)
    found = peak(sizes, (rows, columns), adapter, use, step)
    return replace(found, weights=held(model))


def adapter_of(model: nn.Module, sizes: Architecture) -> Adapter | None:
    """Return what trains.

    Raises:
        InputError: a mixture, or layers that the formulas do not know.
    """
    if isinstance(model, (PrefixModel, PromptModel)):
        kind = "prompt" if isinstance(model, PromptModel) else "prefix"
        return Adapter(model.num_virtual_tokens, method=kind)
    layers = adapted(model)
    if not layers:
        if all(p.requires_grad for p in model.parameters()):
            return None
        raise InputError("some weights train and some do not")
    kinds = {type(layer) for layer in layers.values()}
    if len(kinds) > 1 or not kinds <= LAYERS.keys():
        raise InputError("several methods, or one that is not counted")
    method, rank = LAYERS[kinds.pop()]
    ranks = {rank(a) for layer in layers.values() for _, a in layer.shares()}
    names = [n for n in sizes.linears if any(key.endswith(f".{n}") for key in layers)]
    if len(ranks) != 1 or len(names) * sizes.layers != len(layers):
        raise InputError("several ranks, or not every block")
    return Adapter(ranks.pop(), names, method)


def _optimizer(optimizer: torch.optim.Optimizer, short: int) -> tuple[float, float]:
    """Return bytes a trained parameter: of the states, and while stepping."""
    if isinstance(optimizer, PagedAdamW):
        return 0.0, 0.0  # on the host
    if isinstance(optimizer, AdamW):
        eight = all(group["bits"] == 8 for group in optimizer.param_groups)
        return (2.0 if eight else 8.0), 0.0
    return 2.0 * short, 1.0 * short


def _attention(base: Any, batch: Mapping[str, Any]) -> str:
    mask = batch.get("attention_mask")
    if getattr(base.config, "_attn_implementation", "sdpa") == "eager":
        return "eager"
    return "fused" if mask is None or bool(mask.all()) else "masked"


def _checkpoints(base: nn.Module) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
