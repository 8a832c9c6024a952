"""Files with random damage are read, or refused in one sentence."""

import random
import sys
from pathlib import Path

import pytest

from minipeft.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import fuzz

FILES = 1000  # the same damage in every run; `make fuzz` tries more


@pytest.mark.parametrize("name", fuzz.PARSERS)
def test_damaged_files_are_read_or_refused_in_one_sentence(name, tmp_path):
    count, refused = fuzz.fuzz(name, 0, tmp_path, files=FILES)
    assert count == FILES
    assert refused > FILES / 10


def parser(path, read):
    return fuzz.Parser(path, b"good", read)


def raising(error):
    def read():
        raise error

    return read


def test_anything_but_a_sentence_is_found(tmp_path):
    path = tmp_path / "file"
    assert parser(path, raising(InputError("one sentence."))).check(b"")
    for error in (
        KeyError("x"),
        InputError("two\nlines"),
        InputError(""),
        MemoryError(),
    ):
        with pytest.raises(fuzz.FuzzError):
            parser(path, raising(error)).check(b"")


def test_a_seed_fixes_every_file(tmp_path):
    one = fuzz.PARSERS["checkpoints"](tmp_path)
    for i in range(50):
        first, second = (one.damaged(random.Random(f"{i}")) for _ in range(2))
        assert first == second


@pytest.mark.parametrize("name", fuzz.PARSERS)
def test_every_run_damages_the_same_valid_file(name, tmp_path, monkeypatch):
    good = []
    monkeypatch.setattr(fuzz.Parser, "check", lambda self, data: good.append(self.good))
    for _ in range(2):
        fuzz.fuzz(name, 0, tmp_path, files=0)
    assert good[0] == good[1]
