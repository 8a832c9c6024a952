"""Virtual tokens before the text of a causal model of transformers.

What the model counts is the text alone: its `generate` gets the token ids as they are,
so lengths, penalties, bans, beams and streams are about words that somebody said. The
virtual tokens enter where the model is called: there its mask and its positions grow.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from minipeft.errors import InputError
from minipeft.shapes import Integer

IGNORE = -100  # the label that torch's cross-entropy leaves out
Ids = Integer[Tensor, "batch tokens"]

# What `generate` of transformers takes, and what cannot be there with virtual tokens.
TAKEN = {
    "past_key_values": "the cache begins with the virtual tokens",
    "inputs_embeds": "the text is given by its token ids",
    "inputs": "the text is given as input_ids",
    "position_ids": "the positions follow from the mask",
    "assistant_model": "a second model would not see the virtual tokens",
    "prompt_lookup_num_tokens": "candidates are checked by a length without them",
}


class VirtualTokens(nn.Module, ABC):
    """A frozen causal model of transformers behind trained virtual tokens.

    `self.model` is at any time the model that was given; no layer is changed.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        check_causal(model)
        self.model = model.requires_grad_(False)
        self.train(model.training)
        self.takes_positions = "position_ids" in signature(model.forward).parameters

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @property
    @abstractmethod
    def num_virtual_tokens(self) -> int:
        """How many tokens stand before the text."""

    @abstractmethod
    def enter(self, call: dict[str, Any]) -> int:
        """Put the tokens before a text that the model has not begun to read.

        Args:
            call: what the model is called with; changed in place.

        Returns:
            How many of the tokens the model is to read in this call.
        """

    def forward(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        labels: Ids | None = None,
    ) -> Any:
        """Run the model behind its tokens; logits and loss are those of the text.

        Raises:
            InputError: if an operand does not fit the text.
        """
        check_text(input_ids, attention_mask, labels)
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        call, n = self.ahead(text)
        if labels is not None:
            call["labels"] = pad(
                predicted(labels, attention_mask), (n, 0), value=IGNORE
            )
        out = self.model(**call)
        out.logits = out.logits[:, n:]
        return out

    def generate(
        self, input_ids: Ids, attention_mask: Ids | None = None, **settings: Any
    ) -> Any:
        """Continue a text; `settings` are those of transformers' own `generate`.

        Raises:
            InputError: for a setting that cannot be there with virtual tokens.
        """
        for name, why in TAKEN.items():
            if settings.get(name) is not None:
                raise InputError(f"{name} cannot be given here: {why}; leave it out.")
        check_text(input_ids, attention_mask, None)
        if attention_mask is not None:
            settings["attention_mask"] = attention_mask
        with self._entering():
            return self.model.generate(input_ids, **settings)

    def ahead(self, call: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Return what the model is called with, and how many tokens are read before.

        The mask lets every query look at the virtual tokens. Positions count what the
        mask shows, so that padding on the left takes none.
        """
        call, n = dict(call), self.num_virtual_tokens
        ids, cache = call["input_ids"], call.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise InputError(
                "a cache of fixed size has no room for virtual tokens; leave out "
                "cache_implementation, or choose 'dynamic'."
            )
        past = 0 if cache is None else cache.get_seq_length()
        mask = call.get("attention_mask")
        if mask is None:
            mask = ids.new_ones(len(ids), max(past - n, 0) + ids.shape[1])
        call["attention_mask"] = seen = pad(mask, (n, 0), value=1)
        read = 0 if past else self.enter(call)
        if self.takes_positions:
            positions = (seen.long().cumsum(dim=1) - 1).clamp(min=0)
            call["position_ids"] = positions[:, -(read + ids.shape[1]) :]
        return call, read

    @contextmanager
    def _entering(self) -> Iterator[None]:
        def hook(_: Any, args: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, self.ahead(call)[0]

        handle = self.model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def predicted(labels: Ids, attention_mask: Ids | None) -> Ids:
    """Leave out a text's first token, which nothing of the text predicts.

    So is it without virtual tokens and without padding: the loss is of the same tokens.
    """
    before = torch.zeros_like(labels[:, :1])
    if attention_mask is None:
        seen = torch.ones_like(labels[:, 1:])
    else:
        seen = attention_mask[:, :-1].to(labels.dtype)
    return labels.masked_fill(torch.cat([before, seen], dim=1) == 0, IGNORE)


def check_text(input_ids: Ids, attention_mask: Ids | None, labels: Ids | None) -> None:
    """Refuse a mask or labels of another text; no value is looked at."""
    if input_ids.dim() != 2:
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)}; give (batch, tokens)."
        )
    for name, operand in (("attention_mask", attention_mask), ("labels", labels)):
        if operand is not None and operand.shape != input_ids.shape:
            raise InputError(
                f"{name} has shape {tuple(operand.shape)}; the text has "
                f"{tuple(input_ids.shape)}, and virtual tokens are not counted."
            )


def check_causal(model: Any) -> None:
    """Refuse a model that does not read a text from left to right."""
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", lambda: False)
    if config is None or not can():
        raise InputError(
            f"{type(model).__name__} is no causal language model; give one that can "
            "generate, such as LlamaForCausalLM."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} reads its text with an encoder; virtual tokens "
            "stand before the text of a decoder: give a decoder-only model."
        )


def check_count(num_virtual_tokens: int) -> None:
    """Refuse fewer than one virtual token."""
    if num_virtual_tokens < 1:
        raise InputError(
            f"num_virtual_tokens is {num_virtual_tokens}; choose at least 1."
        )


def wide(values: Tensor) -> Tensor:
    """Return what is trained in float32, or in the wider dtype of the model."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout, gradients, autocast or inference mode."""
    training = {module: module.training for module in model.modules()}
    kind = next(model.parameters()).device.type
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(kind, enabled=False),
    ):
        model.eval()
        try:
            yield
        finally:
            for module, was in training.items():
                module.training = was
