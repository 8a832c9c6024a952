"""Prefix tuning: trained keys and values that stand before the text's own."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.shapes import Inexact, Integer, check_shapes
from minipeft.torch import attention
from minipeft.torch.attention import Head, Mixed


@dataclass(frozen=True)
class Prefix:
    """The virtual tokens of one head, as the attention meets them."""

    K: Inexact[Tensor, "num_virtual_tokens d"]
    V: Inexact[Tensor, "num_virtual_tokens d_v"]


class Reparametrization(nn.Module):
    r"""A small network whose output is the prefix: it trains more steadily.

    $[K, V] = \tanh(P W_\downarrow^T + b) W_\uparrow^T + b$, with one hidden layer for
    all heads of all layers.

    Source: Prefix-tuning (arXiv:2101.00190), section 4.3.
    """

    def __init__(self, num_virtual_tokens: int, d: int, hidden: int, both: int) -> None:
        super().__init__()
        _check_count(num_virtual_tokens)
        self.P = nn.Parameter(torch.randn(num_virtual_tokens, d))
        self.down, self.up = nn.Linear(d, hidden), nn.Linear(hidden, both)
        for layer in (self.down, self.up):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def forward(self) -> Inexact[Tensor, "num_virtual_tokens both"]:
        """Run the network: keys, then values, side by side."""
        rows: Tensor = self.up(torch.tanh(self.down(self.P)))
        return rows


def expand(network: Reparametrization) -> Prefix:
    """Return one head's prefix; after training, the network is thrown away."""
    return Prefix(*network().chunk(2, dim=-1))


def attach(head: Head, prefix: Prefix) -> Head:
    """Put the virtual tokens before the text: $[P_K; K]$, $[P_V; V]$, all visible.

    Raises:
        InputError: if the prefix is not one of this head.
    """
    attention.check_fits(head)
    check_shapes(
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
    attached = copy(head)  # a new Head would look at the mask again
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

    $Y = (1 - \lambda) \, attend(Q, K, V) + \lambda \, attend(Q, P_K, P_V)$, where
    $\lambda$ depends on the query: this is why a prefix cannot be merged.

    Source: Towards a unified view (arXiv:2110.04366), section 3.1.
    """
    return attention.weights(attach(head, prefix))[..., : len(prefix.K)].sum(dim=-1)


@dataclass(frozen=True)
class PrefixConfig:
    """How a prefix starts: from real tokens, from N(0, 1), or from a network.

    tokens: the prefix starts as what the model makes of this text; it has as many
        virtual tokens. Empty: `num_virtual_tokens` random ones.
    hidden: width of the network's hidden layer; 0 trains keys and values directly.
    """

    num_virtual_tokens: int = 10
    tokens: Sequence[int] = ()
    hidden: int = 0

    def __post_init__(self) -> None:
        _check_count(self.num_virtual_tokens)
        if self.tokens and self.hidden:
            raise InputError(
                f"hidden is {self.hidden}, and a network does not start from tokens; "
                "give one of the two."
            )


class PrefixModel(nn.Module):
    """A frozen causal model of transformers behind a trained prefix.

    The prefix enters as `past_key_values`: for the model it is a text that it has read
    already. So every layer's attention meets it, no layer is changed, and `self.model`
    is at any time the model that was given.
    """

    def __init__(self, model: Any, config: PrefixConfig) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.sizes = _sizes(model)
        self.network: Reparametrization | None = None
        if config.hidden:
            layers, heads, d = self.sizes
            width = (config.num_virtual_tokens, model.config.hidden_size)
            both = 2 * layers * heads * d
            self.network = Reparametrization(*width, config.hidden, both)
            self.network.to(model.device)
        else:
            self.P = nn.Parameter(_start(model, config, self.sizes))

    def prefix(self) -> Inexact[Tensor, "layers 2 heads num_virtual_tokens d"]:
        """Return the keys and values of every head of every layer."""
        if self.network is None:
            return self.P
        layers, heads, d = self.sizes
        rows = self.network().view(-1, 2, layers, heads, d)
        return rows.permute(2, 1, 3, 0, 4)

    def drop_network(self) -> None:
        """Keep the network's output and throw the network away: training is over."""
        if self.network is not None:
            self.P = nn.Parameter(self.prefix().detach().clone())
            self.network = None

    def forward(
        self,
        input_ids: Integer[Tensor, "batch tokens"],
        attention_mask: Integer[Tensor, "batch tokens"] | None = None,
        labels: Integer[Tensor, "batch tokens"] | None = None,
    ) -> Any:
        """Run the model after its prefix; logits and loss are those of the text.

        Raises:
            InputError: while training with gradient checkpointing.
        """
        if self.training and _checkpoints(self.model):
            raise InputError(
                "gradient checkpointing switches off the cache that holds the prefix; "
                "train without it."
            )
        return self.model(
            input_ids=input_ids,
            attention_mask=self._seen(input_ids, attention_mask),
            labels=labels,
            past_key_values=self._cache(len(input_ids)),
        )

    def generate(
        self,
        input_ids: Integer[Tensor, "batch tokens"],
        attention_mask: Integer[Tensor, "batch tokens"] | None = None,
        **settings: Any,
    ) -> Integer[Tensor, "batch more"]:
        """Continue a text; `settings` are those of transformers' own `generate`."""
        # It skips as many tokens as the cache holds; these stand there to be skipped.
        n, zeros = self.prefix().shape[3], torch.zeros_like(input_ids[:, :1])
        out: Tensor = self.model.generate(
            torch.cat([zeros.expand(-1, n), input_ids], dim=1),
            attention_mask=self._seen(input_ids, attention_mask),
            past_key_values=self._cache(len(input_ids)),
            **settings,
        )
        return out[:, n:]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def _cache(self, batch: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, (K, V) in enumerate(self.prefix().to(self.model.dtype)):
            cache.update(*(p.expand(batch, *p.shape) for p in (K, V)), i)
        return cache

    def _seen(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        own = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        n = self.prefix().shape[3]
        return torch.cat([own.new_ones(len(own), n), own], dim=1)


def _start(
    model: Any, config: PrefixConfig, sizes: tuple[int, int, int]
) -> Inexact[Tensor, "layers 2 heads num_virtual_tokens d"]:
    layers, heads, d = sizes
    if not config.tokens:
        shape = (layers, 2, heads, config.num_virtual_tokens, d)
        return torch.randn(shape, device=model.device)
    text = torch.tensor([list(config.tokens)], device=model.device)
    with torch.no_grad():
        cache = model(input_ids=text, use_cache=True).past_key_values
    rows = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(rows).float()


def _sizes(model: Any) -> tuple[int, int, int]:
    """Return layers, key-value heads and width of a head; refuse what has none."""
    c = getattr(model, "config", None)
    heads = getattr(c, "num_key_value_heads", None)
    if c is None or heads is None or not hasattr(model, "generate"):
        raise InputError(
            f"{type(model).__name__} is no causal model with a key-value cache; give a "
            "prefix one, such as LlamaForCausalLM."
        )
    d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return c.num_hidden_layers, heads, d


def _checkpoints(model: nn.Module) -> bool:
    # The attribute, and not a method: their names change from version to version.
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def _check_count(num_virtual_tokens: int) -> None:
    if num_virtual_tokens < 1:
        raise InputError(
            f"num_virtual_tokens is {num_virtual_tokens}; choose at least 1."
        )
