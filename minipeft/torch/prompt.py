"""Prompt tuning: trained vectors that stand where embeddings of words would."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.shapes import Integer, Shaped, check_shapes
from minipeft.torch.virtual import VirtualTokens, check_count, undisturbed, wide


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
    check_count(num_virtual_tokens)
    shape = (num_virtual_tokens, d)
    P = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
    return Prompt(P - 0.5)


def forward(
    X: Shaped[Tensor, "*batch tokens d"], prompt: Prompt
) -> Shaped[Tensor, "*batch all_tokens d"]:
    """Put the prompt before every text: $[P; X]$. The model does the rest.

    Raises:
        InputError: if the prompt has another width than the text.

    Source: Prompt tuning (arXiv:2104.08691), section 2.
    """
    check_shapes(
        {"X": (X, "... tokens d"), "the prompt's P": (prompt.P, "num_virtual_tokens d")}
    )
    P = prompt.P.expand(*X.shape[:-2], *prompt.P.shape)
    return torch.cat([P, X], dim=-2)


@dataclass(frozen=True)
class PromptConfig:
    """How a soft prompt starts: as the embeddings of `tokens`, or at random."""

    num_virtual_tokens: int = 10
    tokens: Sequence[int] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self.num_virtual_tokens)


class PromptModel(VirtualTokens):
    """A frozen causal model of transformers behind a trained soft prompt.

    The prompt enters as `inputs_embeds`, in front of the text's own embeddings: only
    the first layer meets it.
    """

    def __init__(self, model: Any, config: PromptConfig) -> None:
        super().__init__(model)
        if getattr(model.config, "hidden_size_per_layer_input", 0):
            raise InputError(
                f"{type(model).__name__} looks up more embeddings of a token in each "
                "layer, and a virtual token has none; use a model without them."
            )
        E = model.get_input_embeddings().weight
        if config.tokens:
            tokens = torch.tensor(list(config.tokens), device=E.device)
            init(E, tokens)  # refuses a token that is not in the vocabulary
            with undisturbed(model):
                # What the layer returns: some scale the rows of their table.
                P = model.get_input_embeddings()(tokens)
        else:
            generator = torch.Generator().manual_seed(config.seed)
            P = init_random(generator, config.num_virtual_tokens, E.shape[1]).P
        with torch.inference_mode(False):  # else the prompt could not be trained
            self.P = nn.Parameter(wide(P.to(E.device, copy=True)))

    @property
    def num_virtual_tokens(self) -> int:
        """How many tokens stand before the text."""
        return len(self.P)

    def enter(self, call: dict[str, Any]) -> int:
        """Put the prompt before the embedded text; the model reads all of it."""
        X = self.model.get_input_embeddings()(call.pop("input_ids"))
        call["inputs_embeds"] = forward(X, Prompt(self.P.to(X.dtype)))
        return len(self.P)
