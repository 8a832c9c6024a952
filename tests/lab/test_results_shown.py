"""The files of a long run, and how a page shows them."""

import sys

import pytest

from minipeft.lab import chapter as chapters
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


def test_what_else_was_chosen_is_named_in_the_command(chapter):
    object.__setattr__(chapter, "held_out", 16)
    made = results.record(chapter, (0,), 1.0, {})
    assert made["command"].endswith("27_learns_less.py --held-out 16 --full")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "chapters/27_learns_less.json"),
        (["--model", "build/glassllm"], "chapters/27_learns_less_glassllm.json"),
        (["--model", "smollm2"], "own/full.json"),
        (
            ["--model", "smollm2", "--held-out", "16"],
            "chapters/27_learns_less_smollm2.json",
        ),
        (["--model", "smollm2", "--held-out", "17"], "own/full.json"),
        (["--held-out", "16"], "own/full.json"),
        (["--model", "build/other"], "own/full.json"),
        (["--model", "build/tiny"], "own/full.json"),
        (["--dtype", "bfloat16"], "own/full.json"),
        (["--targets", "q_proj"], "own/full.json"),
        (["--length", "32"], "own/full.json"),
        (["--data", "mine.jsonl"], "own/full.json"),
    ],
)
def test_only_the_run_that_a_file_describes_overwrites_it(
    options, name, monkeypatch, tmp_path
):
    """Another model, dtype, target or data: the result goes beside the figures."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(chapters, "check_name", lambda *_: None)
    monkeypatch.setattr(chapters, "fetch", lambda *_: None)
    arguments = ["--full", "--out", str(tmp_path / "own"), *options]
    chapter = start("27_learns_less", steps=3, model="tiny", arguments=arguments)
    place = results.place(chapter, tmp_path / "chapters")
    assert place == tmp_path / name


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
