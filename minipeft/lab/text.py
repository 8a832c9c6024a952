"""Make batches from text, and text from a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minipeft.errors import InputError
from minipeft.lab.diagnosis import IGNORE, check_ids
from minipeft.lab.train import Batch, Batches
from minipeft.values import checked


@checked
def encode(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Return texts as one row of tokens, each text closed by the end token."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_special_tokens=False)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


@checked
def opening(tokenizer: Any) -> int:
    """Return the token that opens a text: the begin token, or the end token."""
    begin = tokenizer.bos_token_id
    return int(tokenizer.eos_token_id if begin is None else begin)


@checked
def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt, with the tokenizer's begin token at most once.

    A chat template writes that token itself.
    """
    begin = tokenizer.bos_token
    own = begin is not None and prompt.startswith(begin)
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=not own)
    return ids


@checked
def windows(
    tokens: torch.Tensor, size: tuple[int, int], bos: int, seed: int
) -> Batches:
    """Return batches of random windows of a long text, each opened by `bos`.

    Args:
        tokens: The text, (n,), integer.
        size: Sequences a batch, tokens a sequence.
        bos: The token that opens every sequence.
        seed: Of the windows' positions.
    """
    rows, length = size
    if len(tokens) < length:
        raise InputError(
            f"a window needs {length} tokens, and the text has {len(tokens)}; give a "
            "longer text"
        )

    def batch(step: int) -> Batch:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - length + 2, (rows, 1), generator=generator)
        body = tokens[starts + torch.arange(length - 1)]
        ids = torch.cat([torch.full((rows, 1), bos), body], dim=1)
        return {"input_ids": ids, "labels": ids}

    return batch


@checked
def consecutive(tokens: torch.Tensor, size: tuple[int, int], bos: int) -> list[Batch]:
    """Return a text as batches that hold each token once (but for an odd tail)."""
    rows, length = size
    count = len(tokens) // (length - 1)
    if count == 0:
        raise InputError(
            f"a window needs {length - 1} tokens, and the text has {len(tokens)}; give "
            "a longer text"
        )
    body = tokens[: count * (length - 1)].reshape(count, length - 1)
    ids = torch.cat([torch.full((count, 1), bos), body], dim=1)
    parts = (ids[i : i + rows] for i in range(0, count, rows))
    return [{"input_ids": part, "labels": part} for part in parts]


@checked
def examples(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], size: tuple[int, int], seed: int
) -> Batches:
    """Return batches of prompts with answers, each epoch in a new order.

    Only the answer and the end token are predicted. The last, short batch of an epoch
    is filled up from the next epoch's order.

    Args:
        tokenizer: With an end token and a pad token.
        pairs: (prompt, answer).
        size: Sequences a batch, tokens a sequence at most.
        seed: Of the order.
    """
    rows = [_row(tokenizer, pair, size[1]) for pair in pairs]
    if not rows:
        raise InputError("there are no examples; give at least one")

    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(rows), generator=generator).tolist()

    def batch(step: int) -> Batch:
        first = step * size[0]
        epochs = range(first // len(rows), (first + size[0] - 1) // len(rows) + 1)
        queue = [index for epoch in epochs for index in order(epoch)]
        start = first % len(rows)
        chosen = queue[start : start + size[0]]
        return _padded([rows[i] for i in chosen], tokenizer.pad_token_id)

    return batch


@checked
def example_batches(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], size: tuple[int, int]
) -> list[Batch]:
    """Return each example once, in order: what a validation loss is taken on."""
    rows = [_row(tokenizer, pair, size[1]) for pair in pairs]
    parts = [rows[i : i + size[0]] for i in range(0, len(rows), size[0])]
    return [_padded(part, tokenizer.pad_token_id) for part in parts]


def _row(
    tokenizer: Any, pair: tuple[str, str], length: int
) -> tuple[list[int], list[int]]:
    """Return one example's tokens and labels, cut to `length`."""
    prompt = prompt_ids(tokenizer, pair[0])
    answer = tokenizer.encode(pair[1], add_special_tokens=False)
    answer.append(tokenizer.eos_token_id)
    if len(prompt) >= length:
        raise InputError(
            f"the prompt {pair[0]!r} has {len(prompt)} tokens and leaves no room for "
            f"an answer in {length}; shorten it or take longer sequences"
        )
    ids = (prompt + answer)[:length]
    return ids, ([IGNORE] * len(prompt) + answer)[:length]


def _padded(rows: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    """Fill rows up on the right to the longest."""
    longest = max(len(ids) for ids, _ in rows)

    def stack(parts: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([part + [fill] * (longest - len(part)) for part in parts])

    return {
        "input_ids": stack([ids for ids, _ in rows], pad),
        "attention_mask": stack([[1] * len(ids) for ids, _ in rows], 0),
        "labels": stack([labels for _, labels in rows], IGNORE),
    }


@dataclass(frozen=True)
class Sampling:
    """How text is drawn: temperature 0 takes the likeliest token each time."""

    tokens: int = 80
    temperature: float = 0.8
    top_k: int = 40
    seed: int = 0


@checked
def generate(
    model: Any, tokenizer: Any, prompt: str, sampling: Sampling | None = None
) -> str:
    """Return what a causal model continues a prompt with, without the prompt.

    The same seed gives the same text; torch's own random state is left alone.

    Raises:
        InputError: A token of the prompt is none of the model's.
    """
    use = sampling or Sampling()
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=model.device)
    check_ids(model, {"input_ids": ids}, "the prompt")
    settings: dict[str, Any] = {"do_sample": False}
    if use.temperature > 0:
        settings = {
            "do_sample": True,
            "temperature": use.temperature,
            "top_k": use.top_k,
        }
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(use.seed)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=use.tokens,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text
