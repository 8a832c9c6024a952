"""A model small enough to train in a test, and the sentence encoder MiniLM."""

import pytest
import torch
import transformers

from minipeft.errors import InputError
from minipeft.lab import models


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def toy():
    """Return a two-layer Llama of width 16, always with the same weights."""
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny():
    return models.load("tiny")


@pytest.fixture(scope="session")
def minilm_folder():
    """Return the folder of MiniLM; download it once if there is a network."""
    try:
        return models.fetch("minilm")
    except InputError as error:
        pytest.skip(f"MiniLM is not here: {error}")
