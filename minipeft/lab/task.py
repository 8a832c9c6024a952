"""The task that the chapters share: `tiny` learns The Devil's Dictionary.

One training set, one held-out set and one length of an example, so that the losses of
two chapters can be compared.
"""

from typing import Any

from minipeft.lab import data, text
from minipeft.lab.train import Batch, Batches

LENGTH = 64
"""Tokens that an example may have: longer definitions are cut."""
BEFORE = "tiny before training, loss on the held-out definitions"
"""The label of the loss that every chapter on this task begins with."""


def pairs(split: data.Split) -> list[tuple[str, str]]:
    """Return the (prompt, answer) of each definition of one side of the split."""
    return [(entry.prompt, entry.answer) for entry in data.devils_dictionary(split)]


def training(tokenizer: Any, rows: int = 8, seed: int = 0) -> Batches:
    """Return batches of training definitions, each epoch in a new order.

    Args:
        tokenizer: The model's.
        rows: Definitions a batch.
        seed: Of the order.
    """
    return text.examples(tokenizer, pairs("train"), (rows, LENGTH), seed)


def held_out(tokenizer: Any) -> list[Batch]:
    """Return every definition that no chapter trains on, once."""
    return text.example_batches(tokenizer, pairs("validation"), (25, LENGTH))
