"""Prefix tuning: trained keys and values before the keys and values of the text."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from minipeft.errors import InputError
from minipeft.shapes import Inexact
from minipeft.torch import attention
from minipeft.torch.attention import Head, Mixed
from minipeft.torch.linear import autocast, check_shape
from minipeft.torch.operands import check_tensors
from minipeft.torch.virtual import (
    VirtualTokens,
    check_count,
    check_tokens,
    undisturbed,
    wide,
)
from minipeft.values import check_integer, check_kind


@dataclass(frozen=True)
class Prefix:
    """The virtual tokens of one head: their keys and values."""

    K: Inexact[Tensor, "num_virtual_tokens d"]
    V: Inexact[Tensor, "num_virtual_tokens d_v"]


class Reparametrization(nn.Module):
    r"""A network whose output is the prefix; training it is more stable.

    $[K, V] = \tanh(P W_\downarrow^T + b) W_\uparrow^T + b$, with one hidden layer for
    all heads of all layers.

    Source: Prefix-tuning (arXiv:2101.00190), section 4.3.
    """

    adapted_whole = True  # its layers are trained, and are no targets of adapters

    def __init__(self, num_virtual_tokens: int, d: int, hidden: int, both: int) -> None:
        super().__init__()
        check_count(num_virtual_tokens)
        for name, size in (("d", d), ("hidden", hidden), ("both", both)):
            check_integer(name, size, 1)
        # On the CPU and in float32; torch's defaults have no effect.
        here: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        self.P = nn.Parameter(torch.randn(num_virtual_tokens, d, **here))
        self.down = nn.Linear(d, hidden, **here)
        self.up = nn.Linear(hidden, both, **here)
        for layer in (self.down, self.up):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def forward(self) -> Inexact[Tensor, "num_virtual_tokens both"]:
        """Return the keys and the values, side by side.

        Raises:
            InputError: if a part of another network was put in.
        """
        check_tensors(
            {
                "P": (self.P, "num_virtual_tokens d"),
                "the weight of down": (self.down.weight, "hidden d"),
                "the bias of down": (self.down.bias, "hidden"),
                "the weight of up": (self.up.weight, "both hidden"),
                "the bias of up": (self.up.bias, "both"),
            }
        )
        rows: Tensor = self.up(torch.tanh(self.down(self.P)))
        return rows


def expand(network: Reparametrization) -> Prefix:
    """Return one head's prefix; after training, the network is thrown away."""
    check_kind("network", network, Reparametrization)
    return Prefix(*network().chunk(2, dim=-1))


def attach(head: Head, prefix: Prefix) -> Head:
    """Put the virtual tokens before the text: $[P_K; K]$, $[P_V; V]$, all visible.

    Raises:
        InputError: if the prefix does not fit this head.
    """
    attention.check_fits(head)
    check_kind("prefix", prefix, Prefix)
    check_tensors(
        {
            "the head's K": (head.K, "... keys d"),
            "the head's V": (head.V, "... keys d_v"),
            "the prefix's K": (prefix.K, "num_virtual_tokens d"),
            "the prefix's V": (prefix.V, "num_virtual_tokens d_v"),
        }
    )
    batch, n = head.K.shape[:-2], len(prefix.K)
    K, V = (p.expand(*batch, *p.shape) for p in (prefix.K, prefix.V))
    parts = {"K": torch.cat([K, head.K], dim=-2), "V": torch.cat([V, head.V], dim=-2)}
    if head.mask is not None:
        ones = head.mask.new_ones(*head.mask.shape[:-1], n)
        parts["mask"] = torch.cat([ones, head.mask], dim=-1)
    attached = copy(head)  # a new Head would check the mask again
    for name, value in parts.items():
        object.__setattr__(attached, name, value)
    return attached


def forward(head: Head, prefix: Prefix) -> Mixed:
    """Attend to the virtual tokens and the text together.

    Source: Prefix-tuning (arXiv:2101.00190), section 4.2.
    """
    return attention.forward(attach(head, prefix))


def gate(head: Head, prefix: Prefix) -> Inexact[Tensor, "*batch queries"]:
    r"""Return $\lambda$, the share of its attention that a query gives to the prefix.

    Formula: `reference.prefix.gate`. $\lambda$ depends on the query, so no merged
    weight can replace a prefix.

    Source: Towards a unified view (arXiv:2110.04366), section 3.1.
    """
    return attention.weights(attach(head, prefix))[..., : len(prefix.K)].sum(dim=-1)


@dataclass(frozen=True)
class PrefixConfig:
    """The start of a prefix: from real tokens, from N(0, 1), or from a network.

    tokens: a text; the prefix starts as the model's keys and values of this text, with
    one virtual token for each token. Empty: `num_virtual_tokens` random ones.
    hidden: width of the network's hidden layer; 0 trains keys and values directly.
    """

    num_virtual_tokens: int = 10
    tokens: Sequence[int] = ()
    hidden: int = 0

    def __post_init__(self) -> None:
        check_count(self.num_virtual_tokens)
        check_tokens(self.tokens)
        check_integer("hidden", self.hidden, 0)
        if self.tokens and self.hidden:
            raise InputError(
                f"hidden is {self.hidden}, and a network does not start from tokens; "
                "give one of the two."
            )


class PrefixModel(VirtualTokens):
    """A frozen causal model of transformers with a trained prefix.

    The prefix is put into the model's cache of keys and values, as if the model had
    already read a text before. So the attention of every layer reads it.
    """

    def __init__(self, model: Any, config: PrefixConfig) -> None:
        check_kind("config", config, PrefixConfig)
        super().__init__(model)
        pairs = _pairs(model, config.tokens or [0])
        self.widths = [(K.shape[-1], V.shape[-1]) for K, V in pairs]
        rows = _stack(pairs)
        layers, _, heads, _, d = rows.shape
        self.sizes = (layers, heads, d)
        self.network: Reparametrization | None = None
        with torch.inference_mode(False):  # else no training
            if config.hidden:
                width = (config.num_virtual_tokens, model.config.hidden_size)
                both = 2 * layers * heads * d
                network = Reparametrization(*width, config.hidden, both)
                self.network = network.to(model.device)
            else:
                if not config.tokens:
                    shape = (layers, 2, heads, config.num_virtual_tokens, d)
                    device = model.device
                    rows = wide(torch.randn(shape, device=device, dtype=rows.dtype))
                self.P = nn.Parameter(rows.clone())
        self.freeze()

    @property
    def num_virtual_tokens(self) -> int:
        """The number of virtual tokens before the text."""
        if self.network is not None:
            return len(self.network.P)
        return self.prefix().shape[3]

    def prefix(self) -> Inexact[Tensor, "layers 2 heads num_virtual_tokens d"]:
        """Return the keys and values of every head of every layer."""
        layers, heads, d = self.sizes
        if self.network is None:
            n = self.P.shape[3] if self.P.dim() > 3 else 1
            check_shape("P", self.P, layers, 2, heads, n, d)
            return self.P
        rows = self.network().view(-1, 2, layers, heads, d)
        return rows.permute(2, 1, 3, 0, 4)

    def drop_network(self) -> None:
        """Keep the network's last output as the prefix and delete the network."""
        if self.network is not None:
            self.P = nn.Parameter(self.prefix().detach().clone())
            self.network = None

    def enter(self, call: dict[str, Any]) -> int:
        """Fill the cache with the prefix; the model itself reads no virtual token.

        Raises:
            InputError: without a cache, or in training with gradient checkpointing.
        """
        from transformers import DynamicCache

        if call.get("use_cache") is False:
            raise InputError("use_cache is False, and the prefix is in the cache.")
        if self.training and _checkpoints(self.model):
            raise InputError(
                "gradient checkpointing switches off the cache that holds the prefix; "
                "train without it."
            )
        if call.get("past_key_values") is None:
            call["past_key_values"] = DynamicCache(config=self.model.config)
        batch = len(call["input_ids"])
        rows = self.prefix()
        rows = rows.to(_computing(self.model, rows.device))
        for i, (pair, widths) in enumerate(zip(rows, self.widths, strict=True)):
            # A layer that is narrower than the widest uses only the first features.
            parts = [p[..., :d] for p, d in zip(pair, widths, strict=True)]
            K, V = (p.expand(batch, *p.shape) for p in parts)
            call["past_key_values"].update(K, V, i)
        return 0


Pair = tuple[Tensor, Tensor]  # keys and values of a layer: (heads, tokens, d)


def _pairs(model: Any, tokens: Sequence[int]) -> list[Pair]:
    """Return the keys and values that every layer of the model computes for a text.

    Raises:
        InputError: if a layer stores something else, or not all keys and values.
    """
    text, name = torch.tensor([list(tokens)], device=model.device), type(model).__name__
    with undisturbed(model):
        cache = getattr(model(input_ids=text, use_cache=True), "past_key_values", None)
    if cache is None:
        raise InputError(
            f"{name} keeps no keys and values for a prefix to stand before; use a "
            "prompt instead."
        )
    pairs = []
    for i, layer in enumerate(cache.layers):
        K, V = (getattr(layer, part, None) for part in ("keys", "values"))
        if K is None or V is None:
            raise InputError(
                f"layer {i} of {name} keeps another state than keys and values, and a "
                "prefix would not reach it; use a prompt instead."
            )
        if K.shape[2] != len(tokens):
            raise InputError(
                f"layer {i} of {name} keeps {K.shape[2]} of {len(tokens)} tokens: its "
                "window slides; start from a shorter text."
            )
        pairs.append((K[0], V[0]))
    if len(heads := {len(part) for pair in pairs for part in pair}) > 1:
        raise InputError(
            f"the layers of {name} have {sorted(heads)} heads of keys and values; a "
            "prefix needs one number for all: use a prompt instead."
        )
    return pairs


@torch.inference_mode(False)
def _stack(pairs: list[Pair]) -> Inexact[Tensor, "layers 2 heads tokens d"]:
    d = max(part.shape[-1] for pair in pairs for part in pair)
    padded = [
        torch.stack([pad(part, (0, d - part.shape[-1])) for part in pair])
        for pair in pairs
    ]
    return wide(torch.stack(padded))


def _computing(model: Any, device: torch.device) -> torch.dtype:
    """Return the dtype in which the model's attention computes."""
    if autocast(device):  # an offloaded model is on the device meta
        return torch.get_autocast_dtype(device.type)
    dtype: torch.dtype = model.dtype
    return dtype


def _checkpoints(model: nn.Module) -> bool:
    # Read from the attribute: the names of the methods change between versions.
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
