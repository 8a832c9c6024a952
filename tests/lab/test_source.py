"""Runs go on with the data that they began with, and data are judged before a model."""

import json
import os
from pathlib import Path

import pytest

from minipeft.errors import InputError
from minipeft.lab import chapter as chapters
from minipeft.lab import held_out, source
from minipeft.lab.chapter import start
from minipeft.lab.held_out import HeldOut
from minipeft.lab.task import dictionary


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
        match=r"kept is for runs on .*mine\.jsonl \(60 examples, SHA-256 \w{8}…\), and "
        r"this one is on .*mine2\.jsonl \(59 examples, .*; give the data of those "
        r"runs, or another folder; .*, remove .*run-data\.json$",
    ):
        start("01_lora", 30, arguments=[*options, *other]).load()
    with pytest.raises(InputError, match=r"this one is on The Devil's Dictionary \("):
        start("01_lora", 30, arguments=options).load()
    assert (folder / source.KEPT).read_bytes() == before
    start("01_lora", 30, arguments=[*options, *mine]).load()
    moved = ["--data", written(tmp_path / "moved.jsonl", 60)]
    start("01_lora", 30, arguments=[*options, *moved]).load()
    before = (folder / source.KEPT).read_bytes()
    (folder / "run-001.safetensors").unlink()  # one that is under way may save none yet
    for more in (options, options[:-1]):
        with pytest.raises(InputError, match="kept is for runs on"):
            start("01_lora", 30, arguments=[*more, *other]).load()
    assert (folder / source.KEPT).read_bytes() == before
    (folder / source.KEPT).unlink()  # as the message says
    start("01_lora", 30, arguments=[*options[:-1], *other]).load()


def test_other_data_are_named_where_they_cannot_hold_out_as_many(tmp_path):
    mine = written(tmp_path / "mine.jsonl", 96)
    options = ["--checkpoint", str(tmp_path / "kept")]
    first = [*options, "--data", mine, "--held-out", "8"]
    start("01_lora", 30, arguments=first).load()
    other = written(tmp_path / "other.jsonl", 60)  # of which fewer can be held out
    resumed = [*options, "--data", other, "--resume"]
    with pytest.raises(InputError, match=r"is for runs on .*mine\.jsonl \(96 "):
        start("01_lora", 30, arguments=resumed).load()


def test_runs_on_the_dictionary_are_held_against_it(tmp_path):
    options = ["--checkpoint", str(tmp_path / "kept")]
    start("01_lora", 30, arguments=options).load()
    (tmp_path / "kept" / "run-001.safetensors").touch()
    mine = ["--data", written(tmp_path / "mine.jsonl", 60), "--resume"]
    with pytest.raises(InputError, match="is for runs on The Devil's Dictionary"):
        start("01_lora", 30, arguments=[*options, *mine]).load()
    (tmp_path / "kept" / source.KEPT).write_text("[]")
    resumed = [*options, "--resume"]
    with pytest.raises(InputError, match=r"run-data\.json is not .* or remove it: "):
        start("01_lora", 30, arguments=resumed).load()
    (tmp_path / "kept" / source.KEPT).unlink()  # as the message says
    start("01_lora", 30, arguments=resumed).load()
    assert b"Devil" in (tmp_path / "kept" / source.KEPT).read_bytes()


def test_no_file_of_another_is_replaced(tmp_path):
    """Also the examples that are learned from may lie in the folder of checkpoints."""
    folder = tmp_path / "kept"
    folder.mkdir()
    data = folder / "data.json"
    written(data, 60)
    before = data.read_bytes()
    options = ["--checkpoint", str(folder), "--data", str(data)]
    start("01_lora", 30, arguments=[*options, "--held-out", "4"]).load()
    assert data.read_bytes() == before
    for name in (source.KEPT, held_out.KEPT):
        for path in folder.iterdir():
            path.unlink()
        mine = folder / name
        written(mine, 60)
        options = ["--checkpoint", str(folder), "--data", str(mine)]
        for more in ([], ["--resume"]):
            with pytest.raises(InputError, match="is not what a run wrote"):
                start("01_lora", 30, arguments=[*options, *more]).load()
        assert [*folder.iterdir()] == [mine]
        assert mine.read_bytes() == before


def unreadable(path, monkeypatch):
    path.write_text("{}")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)


def linked(path, monkeypatch):
    (path.parent / "mine.json").write_text("of value")
    path.symlink_to(path.parent / "mine.json")


def content(text):
    return lambda path, monkeypatch: path.write_text(text)


RECORDS = [
    (lambda path, monkeypatch: path.mkdir(), "no regular file"),
    (lambda path, monkeypatch: os.mkfifo(path), "no regular file"),
    (lambda path, monkeypatch: path.symlink_to("nowhere"), "it is a link"),
    (linked, "it is a link"),
    (unreadable, "Permission denied"),
    (content("[" * 200_000), ""),
    (content("[" * 50_000), "recursion"),
    (content("{"), "Expecting property name"),
    (content("[]"), "its fields are not "),
    (content("{}"), "its fields are not "),
    (content('{"name": 1, "examples": 2, "sha256": []}'), "name is 1|its fields are"),
    (content('{"count": -3}'), "count is -3|its fields are"),
    (content('{"count": true}'), "count is True|its fields are"),
]


@pytest.mark.parametrize(("make", "why"), RECORDS, ids=range(len(RECORDS)))
@pytest.mark.parametrize("kept", [source.KEPT, held_out.KEPT])
def test_what_no_run_wrote_is_one_sentence_and_stays(
    tmp_path, monkeypatch, make, why, kept
):
    make(tmp_path / kept, monkeypatch)
    before = (tmp_path / kept).lstat()
    keep = {
        source.KEPT: lambda: source.keep_source(tmp_path, "A", whole),
        held_out.KEPT: lambda: held_out.keep(tmp_path, HeldOut(whole, 1, None)),
    }
    whole = dictionary()
    said = f"^.*{kept} is not what a run wrote \\(.*({why}).*\\); move it to .*anew$"
    with pytest.raises(InputError, match=said):
        keep[kept]()
    after = (tmp_path / kept).lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    (tmp_path / kept).rename(tmp_path.parent / f"{tmp_path.name}-moved")
    monkeypatch.undo()
    for name in keep:
        keep[name]()
    assert held_out.kept_count(tmp_path) == len(whole.validation)


def test_data_are_judged_before_the_model_is_read(tmp_path, monkeypatch):
    monkeypatch.delattr(chapters, "load")
    few = ["--data", written(tmp_path / "few.jsonl", 3)]
    with pytest.raises(InputError, match="holds 3 examples; give at least 40"):
        start("01_lora", 30, arguments=few).load()
    mine = ["--data", written(tmp_path / "mine.jsonl", 60), "--held-out", "16"]
    with pytest.raises(InputError, match=r"--held-out is 16, .* at most \d"):
        start("01_lora", 30, arguments=mine).load()
