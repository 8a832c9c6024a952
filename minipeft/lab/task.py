"""The task that the chapters share: `tiny` learns The Devil's Dictionary.

All chapters use one training set, one held-out set and one length of an example, so
their losses can be compared. `--data` replaces the task by a file.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.lab import data, text
from minipeft.lab.train import Batch, Batches

LENGTH = 64
"""Tokens that an example may have: longer ones are cut."""
BEFORE = "tiny before training, loss on the held-out definitions"
"""The label of the loss that every chapter on this task begins with."""
FORMS = (
    '{"word": …, "definition": …}, {"prompt": …, "completion": …}, '
    '{"messages": [{"role": …, "content": …}, …]} or {"text": …}'
)
"""What a line of a JSONL file may be."""
FEWEST = 40
"""Examples that a file must hold: some are set apart, and some start a prompt."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """The training and the held-out examples: (prompt, answer) pairs."""

    train: list[Pair]
    validation: list[Pair]

    def training(self, tokenizer: Any, rows: int = 8, seed: int = 0) -> Batches:
        """Return batches of training examples, each epoch in a new order.

        Args:
            tokenizer: The model's.
            rows: Examples a batch.
            seed: Of the order.
        """
        return text.examples(tokenizer, self.train, (rows, LENGTH), seed)

    def held_out(self, tokenizer: Any) -> list[Batch]:
        """Return every example that no chapter trains on, once."""
        return text.example_batches(tokenizer, self.validation, (25, LENGTH))


def dictionary() -> Task:
    """Return the definitions, on the two sides of their split."""
    sides = [data.devils_dictionary(split) for split in ("train", "validation")]
    train, validation = ([(e.prompt, e.answer) for e in side] for side in sides)
    return Task(train, validation)


def from_file(path: Path) -> Task:
    """Return the examples of a JSONL file; one in ten, by its hash, is held out.

    Args:
        path: UTF-8, an object a line: see `FORMS`. Of messages the last is the answer;
            a text's first word is its prompt.

    Raises:
        InputError: The file cannot be read, a line is none of these, there are fewer
            than `FEWEST` examples.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error})") from None
    pairs = [
        _pair(line, f"line {number} of {path}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    sides: dict[bool, list[Pair]] = {True: [], False: []}
    for pair in dict.fromkeys(pairs):  # each pair on one side only
        digest = hashlib.sha256(pair[0].encode() or pair[1].encode()).digest()
        sides[digest[0] < 26].append(pair)
    if len(pairs) < FEWEST or not sides[True]:
        raise InputError(
            f"{path} holds {len(pairs)} examples, {len(sides[True])} of them held out; "
            f"give at least {FEWEST}"
        )
    return Task(sides[False], sides[True])


def _pair(line: str, where: str) -> Pair:
    """Return (prompt, answer) of a line."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error})") from None
    fields = _fields(entry) if isinstance(entry, dict) else None
    if fields is None or not all(isinstance(field, str) for field in fields):
        raise InputError(f"{where} is none of {FORMS}")
    prompt, answer = fields
    if not answer.strip():
        raise InputError(f"{where} has an empty answer; leave the line out")
    return prompt, answer


def _fields(entry: Mapping[str, Any]) -> tuple[Any, Any] | None:
    if {"word", "definition"} <= entry.keys():
        part = entry.get("part")
        prompt = f"{entry['word']}, {part}" if part else entry["word"]
        return prompt, f" {entry['definition']}"
    if {"prompt", "completion"} <= entry.keys():
        return entry["prompt"], entry["completion"]
    if isinstance(entry.get("text"), str):
        first, space, rest = entry["text"].strip().partition(" ")
        return first, space + rest
    return _messages(entry.get("messages"))


def _messages(messages: Any) -> tuple[Any, Any] | None:
    """Return a chat without a template of its own: `role: content`, line by line."""
    if not isinstance(messages, list) or len(messages) < 2:
        return None
    if not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        return None
    *before, last = messages
    if not all(isinstance(m["content"], str) for m in messages):
        return None
    prompt = "".join(f"{m['role']}: {m['content']}\n" for m in before)
    return f"{prompt}{last['role']}:", f" {last['content']}"
