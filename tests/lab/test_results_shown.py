"""The files of a long run, and how a page shows them."""

import sys

import pytest

from minipeft.lab import results
from minipeft.lab.chapter import start


@pytest.fixture
def chapter(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return start("27_learns_less", steps=3, model="tiny", arguments=["--full"])


def test_a_record_says_what_made_it(chapter):
    made = results.record(chapter, (0, 1), 90.0, {"losses": [1.0]})
    assert made["command"] == "python chapters/27_learns_less.py --full"
    assert made["seeds"] == [0, 1]
    assert made["losses"] == [1.0]
    assert {"python", "minipeft", "torch"} <= made["versions"].keys()
    command, run, versions = results.origin(made).split("\n")
    assert command == made["command"]
    assert run == "seeds [0, 1], 1.5 minutes"
    assert f"torch {made['versions']['torch']}" in versions


def test_a_model_that_is_not_the_default_is_named_in_the_command(chapter):
    object.__setattr__(chapter, "model", "smollm2")
    made = results.record(chapter, (0,), 1.0, {})
    assert made["command"].endswith("27_learns_less.py --model smollm2 --full")


def test_the_spread_is_half_the_distance_of_the_ends():
    assert results.spread([1.0, 2.0, 4.5], 2) == "2.50 ± 1.75"
    assert results.spread([3.0]) == "3.000 ± 0.000"


def test_a_table_has_a_head_and_numbers_on_the_right():
    rows = [["method", "loss"], ["LoRA", "3.7"], ["DoRA", "3.6"]]
    assert results.table(rows).split("\n") == [
        "| method | loss |",
        "| --- | ---: |",
        "| LoRA | 3.7 |",
        "| DoRA | 3.6 |",
    ]
