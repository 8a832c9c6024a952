"""Prompt tuning: trained vectors in place of the embeddings of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.shapes import Integer, Shaped
from minipeft.torch.operands import check_generator, check_indices, check_tensors
from minipeft.torch.virtual import (
    VirtualTokens,
    check_count,
    check_tokens,
    undisturbed,
    wide,
)
from minipeft.values import check_integer, check_kind


@dataclass(frozen=True)
class Prompt:
    """The soft prompt: one vector for each virtual token."""

    P: Shaped[Tensor, "num_virtual_tokens d"]


def init(E: Shaped[Tensor, "vocabulary d"], tokens: Integer[Tensor, " n"]) -> Prompt:
    """Start from the embeddings of real tokens; the new prompt equals a text.

    Arguments: `reference.prompt.init`.

    Raises:
        InputError: if there is no token, or a token is not in the vocabulary.

    Source: Prompt tuning (arXiv:2104.08691), section 3.2.
    """
    check_tensors({"E": (E, "vocabulary d")})
    check_indices("tokens", tokens)
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
    """Start from U(-0.5, 0.5), the simplest of the paper's three starts."""
    check_generator(generator)
    check_count(num_virtual_tokens)
    check_integer("d", d, 0)
    shape = (num_virtual_tokens, d)
    P = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
    return Prompt(P - 0.5)


def forward(
    X: Shaped[Tensor, "*batch tokens d"], prompt: Prompt
) -> Shaped[Tensor, "*batch all_tokens d"]:
    """Put the prompt before every embedded text: $[P; X]$.

    Raises:
        InputError: if the prompt and the text have vectors of different lengths.

    Source: Prompt tuning (arXiv:2104.08691), section 2.
    """
    check_kind("the prompt", prompt, Prompt)
    check_tensors(
        {"X": (X, "... tokens d"), "the prompt's P": (prompt.P, "num_virtual_tokens d")}
    )
    P = prompt.P.expand(*X.shape[:-2], *prompt.P.shape)
    return torch.cat([P, X], dim=-2)


@dataclass(frozen=True)
class PromptConfig:
    """The start of a soft prompt: the embeddings of `tokens`, or random numbers."""

    num_virtual_tokens: int = 10
    tokens: Sequence[int] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.num_virtual_tokens)
        check_tokens(self.tokens)
        check_integer("seed", self.seed, -(2**63), 2**63 - 1)


class PromptModel(VirtualTokens):
    """A frozen causal model of transformers with a trained soft prompt.

    The model gets the prompt and the text's own embeddings as `inputs_embeds`; so only
    the first layer reads the prompt.
    """

    def __init__(self, model: Any, config: PromptConfig) -> None:
        check_kind("config", config, PromptConfig)
        super().__init__(model)
        if getattr(model.config, "hidden_size_per_layer_input", 0):
            raise InputError(
                f"{type(model).__name__} looks up more embeddings of a token in each "
                "layer, and a virtual token has none; use a model without them."
            )
        E = model.get_input_embeddings().weight
        if config.tokens:
            tokens = torch.tensor(list(config.tokens), device=E.device)
            init(E, tokens)  # raises if a token is not in the vocabulary
            with undisturbed(model):
                # The layer's output: some layers scale the rows of their table.
                P = model.get_input_embeddings()(tokens)
        else:
            generator = torch.Generator().manual_seed(config.seed)
            P = init_random(generator, config.num_virtual_tokens, E.shape[1]).P
        with torch.inference_mode(False):  # else no training
            self.P = nn.Parameter(wide(P.to(E.device, copy=True)))
        self.freeze()

    @property
    def num_virtual_tokens(self) -> int:
        """The number of virtual tokens before the text."""
        check_tensors({"the prompt's P": (self.P, "num_virtual_tokens d")})
        return len(self.P)

    def enter(self, call: dict[str, Any]) -> int:
        """Put the prompt before the embedded text; the model reads both."""
        X = self.model.get_input_embeddings()(call.pop("input_ids"))
        call["inputs_embeds"] = forward(X, Prompt(self.P.to(X.dtype)))
        return len(self.P)
