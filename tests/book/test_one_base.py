"""Chapters that compare many models keep one base in memory at a time."""

import gc
import runpy
import sys
import weakref
from pathlib import Path

import pytest
import transformers

from minipeft.lab import data, models, plots, timing, train
from minipeft.lab.chapter import Chapter
from tests.operands import annotations_off

CHAPTERS = Path(__file__).parents[2] / "chapters"
pytestmark = pytest.mark.slow


def once(device, turn, *given):
    """Run a turn, and report one second."""
    turn(*given)
    return 1.0


def kept_at_each_load(monkeypatch, chapter: Path, model: Path) -> list[int]:
    """Run a chapter without training; count older bases whenever one is loaded."""
    found, bases, load = [], weakref.WeakSet(), Chapter.load

    def counting(self, quantize=None):
        gc.collect()  # a model holds itself in a circle
        found.append(len(bases))
        loaded = load(self, quantize)
        bases.add(loaded.model)
        return loaded

    entries = data.devils_dictionary
    monkeypatch.setattr(
        data, "devils_dictionary", lambda split=None: entries(split)[:24]
    )
    monkeypatch.setattr(train, "train", lambda model, *given, **more: [0.0])
    monkeypatch.setattr(train, "loss", lambda model, batches: 1.0)
    monkeypatch.setattr(timing, "cost", once)
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    monkeypatch.setattr(Chapter, "load", counting)
    words = [chapter, "--model", model, "--steps", 1, "--out", model / "out"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with annotations_off():
        runpy.run_path(str(chapter), run_name="__main__")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Save a random model of one small block with the tokenizer of `tiny`."""
    folder, tiny = tmp_path_factory.mktemp("model"), models.load("tiny")
    config = tiny.model.config
    config.num_hidden_layers, config.hidden_size, config.head_dim = 1, 64, 16
    config.intermediate_size, config.num_attention_heads = 96, 4
    config.num_key_value_heads, config.layer_types = 4, None
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["06_qlora", "17_side_by_side"])
def test_a_chapter_keeps_one_base_at_a_time(monkeypatch, model, name):
    path = CHAPTERS / f"{name}.py"
    kept = kept_at_each_load(monkeypatch, path, model)
    assert len(kept) > 6
    assert not any(kept)
