"""Prompt tuning: trained vectors that stand where embeddings of words would."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from minipeft.errors import InputError
from minipeft.shapes import Inexact, Integer, Shaped

IGNORE = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Prompt:
    """The soft prompt: one vector for each virtual token."""

    P: Shaped[Tensor, "num_virtual_tokens d"]


def init(E: Shaped[Tensor, "vocabulary d"], tokens: Integer[Tensor, " n"]) -> Prompt:
    """Start from the embeddings of real tokens: at first the prompt is a text.

    Args:
        E: the model's embedding table.
        tokens: which rows to copy, at least one; repeat a short text to fill a length.

    Raises:
        InputError: if there is no token, or one that the vocabulary does not have.

    Source: Prompt tuning (arXiv:2104.08691), section 3.2.
    """
    if not len(tokens):
        raise InputError("the soft prompt has no token; give at least one.")
    strange = tokens[(tokens < 0) | (tokens >= len(E))]
    if len(strange):
        raise InputError(
            f"token {int(strange[0])} is not in the vocabulary; choose 0 to "
            f"{len(E) - 1}."
        )
    return Prompt(E[tokens].clone())


def init_random(generator: torch.Generator, num_virtual_tokens: int, d: int) -> Prompt:
    """Start from U(-0.5, 0.5), the paper's baseline: slower, and needs more steps."""
    _check_count(num_virtual_tokens)
    return Prompt(torch.rand(num_virtual_tokens, d, generator=generator) - 0.5)


def forward(
    X: Shaped[Tensor, "*batch tokens d"], prompt: Prompt
) -> Shaped[Tensor, "*batch all_tokens d"]:
    """Put the prompt before every text: $[P; X]$. The model does the rest.

    Source: Prompt tuning (arXiv:2104.08691), section 2.
    """
    P = prompt.P.expand(*X.shape[:-2], *prompt.P.shape)
    return torch.cat([P, X], dim=-2)


@dataclass(frozen=True)
class PromptConfig:
    """How a soft prompt starts: as the embeddings of `tokens`, or at random."""

    num_virtual_tokens: int = 10
    tokens: Sequence[int] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count(self.num_virtual_tokens)


class PromptModel(nn.Module):
    """A frozen causal model of transformers behind a trained soft prompt.

    The prompt enters as `inputs_embeds`, in front of the text's own embeddings: only
    the first layer meets it, no layer is changed, and `self.model` is at any time the
    model that was given.
    """

    def __init__(self, model: Any, config: PromptConfig) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        E = model.get_input_embeddings().weight
        if config.tokens:
            start = init(E, torch.tensor(list(config.tokens), device=E.device))
        else:
            generator = torch.Generator().manual_seed(config.seed)
            start = init_random(generator, config.num_virtual_tokens, E.shape[1])
        self.P = nn.Parameter(start.P.detach().to(E.device, torch.float32))

    def forward(
        self,
        input_ids: Integer[Tensor, "batch tokens"],
        attention_mask: Integer[Tensor, "batch tokens"] | None = None,
        labels: Integer[Tensor, "batch tokens"] | None = None,
    ) -> Any:
        """Run the model on prompt and text; logits and loss are those of the text."""
        n = len(self.P)
        if labels is not None:
            # A text's first token is not predicted, with a prompt before it or without.
            labels = pad(labels[:, 1:], (n + 1, 0), value=IGNORE)
        out = self.model(
            inputs_embeds=self._embedded(input_ids),
            attention_mask=self._seen(input_ids, attention_mask),
            labels=labels,
        )
        out.logits = out.logits[:, n:]
        return out

    def generate(
        self,
        input_ids: Integer[Tensor, "batch tokens"],
        attention_mask: Integer[Tensor, "batch tokens"] | None = None,
        **settings: Any,
    ) -> Integer[Tensor, "batch more"]:
        """Continue a text; `settings` are those of transformers' own `generate`."""
        new: Tensor = self.model.generate(
            inputs_embeds=self._embedded(input_ids),
            attention_mask=self._seen(input_ids, attention_mask),
            **settings,
        )
        return torch.cat([input_ids, new], dim=1)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def _embedded(self, input_ids: Tensor) -> Inexact[Tensor, "batch all_tokens d"]:
        X = self.model.get_input_embeddings()(input_ids)
        return forward(X, Prompt(self.P.to(X.dtype)))

    def _seen(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        own = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return pad(own, (len(self.P), 0), value=1)


def _check_count(num_virtual_tokens: int) -> None:
    if num_virtual_tokens < 1:
        raise InputError(
            f"num_virtual_tokens is {num_virtual_tokens}; choose at least 1."
        )
