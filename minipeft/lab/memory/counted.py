"""The setting of the book: one for all its counts of a model of 7 billion."""

from minipeft.lab.memory.rows import Adapter
from minipeft.lab.memory.shapes import LLAMA_7B
from minipeft.lab.memory.training import (
    Memory,
    Precision,
    quantized_bits,
    training_memory,
)

COUNTED_TOKENS = (4, 512)
"""Sequences and their length, in every count of `LLAMA_7B` that the book compares."""

COUNTED_ADAPTER = Adapter(r=64)
"""LoRA on all linear layers at the rank of QLoRA's paper (arXiv:2305.14314)."""


def ways_to_train() -> dict[str, Memory]:
    """Return what `LLAMA_7B` needs in four ways of training, under the book's labels.

    `COUNTED_TOKENS` and `COUNTED_ADAPTER` in all of them; adapters, their gradients and
    Adam's states have 32 bits, activations 16 (all 32 in the first). Training
    everything in 16 bits keeps a float32 copy of the weights beside Adam's states.
    """
    model, tokens, adapter = LLAMA_7B, COUNTED_TOKENS, COUNTED_ADAPTER
    on_16 = Precision(weights=2, gradients=4, activations=2)
    on_4 = Precision(quantized_bits(4, 64, 256) / 8, gradients=4, activations=2)
    whole = Precision(weights=2, gradients=2, states=12, activations=2)
    return {
        "everything, 32 bits": training_memory(model, tokens),
        "everything, 16 bits": training_memory(model, tokens, None, whole),
        "LoRA on 16 bits": training_memory(model, tokens, adapter, on_16),
        "QLoRA: LoRA on 4 bits": training_memory(model, tokens, adapter, on_4),
    }
