"""Runs go on with the data that they began with, and data are judged before a model."""

import json

import pytest

from minipeft.errors import InputError
from minipeft.lab import chapter as chapters
from minipeft.lab import source
from minipeft.lab.chapter import start


def written(path, count):
    lines = [
        json.dumps({"prompt": f"What is {i}?", "completion": f" {i}"})
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def began(tmp_path):
    """A folder with a run on 60 examples, and the options that made it."""
    folder = tmp_path / "kept"
    mine = ["--data", written(tmp_path / "mine.jsonl", 60)]
    options = ["--checkpoint", str(folder), "--held-out", "4"]
    start("01_lora", 30, arguments=[*options, *mine]).load()
    (folder / "run-001.safetensors").touch()
    return folder, [*options, "--resume"], mine


def test_a_run_that_is_resumed_has_the_data_it_began_with(began, tmp_path):
    folder, options, mine = began
    other = ["--data", written(tmp_path / "mine2.jsonl", 59)]
    before = (folder / source.KEPT).read_bytes()
    with pytest.raises(
        InputError,
        match=r"kept holds runs on .*mine\.jsonl \(60 examples, SHA-256 \w{8}…\), and "
        r"--resume would go on with .*mine2\.jsonl \(59 examples, .*; give the data of "
        "those runs, or start in another folder without --resume",
    ):
        start("01_lora", 30, arguments=[*options, *other]).load()
    with pytest.raises(InputError, match=r"go on with The Devil's Dictionary \("):
        start("01_lora", 30, arguments=options).load()
    assert (folder / source.KEPT).read_bytes() == before
    start("01_lora", 30, arguments=[*options, *mine]).load()
    moved = ["--data", written(tmp_path / "moved.jsonl", 60)]
    start("01_lora", 30, arguments=[*options, *moved]).load()
    (folder / "run-001.safetensors").unlink()  # nothing goes on: any data will do
    start("01_lora", 30, arguments=[*options, *other]).load()


def test_runs_on_the_dictionary_are_held_against_it(tmp_path):
    options = ["--checkpoint", str(tmp_path / "kept")]
    start("01_lora", 30, arguments=options).load()
    (tmp_path / "kept" / "run-001.safetensors").touch()
    mine = ["--data", written(tmp_path / "mine.jsonl", 60), "--resume"]
    with pytest.raises(InputError, match="holds runs on The Devil's Dictionary"):
        start("01_lora", 30, arguments=[*options, *mine]).load()
    (tmp_path / "kept" / source.KEPT).write_text("[]")
    with pytest.raises(InputError, match=r"data\.json is damaged \(.*; start again"):
        start("01_lora", 30, arguments=[*options, "--resume"]).load()


def test_data_are_judged_before_the_model_is_read(tmp_path, monkeypatch):
    monkeypatch.delattr(chapters, "load")
    few = ["--data", written(tmp_path / "few.jsonl", 3)]
    with pytest.raises(InputError, match="holds 3 examples; give at least 40"):
        start("01_lora", 30, arguments=few).load()
    mine = ["--data", written(tmp_path / "mine.jsonl", 60), "--held-out", "16"]
    with pytest.raises(InputError, match=r"--held-out is 16, .* at most \d"):
        start("01_lora", 30, arguments=mine).load()
