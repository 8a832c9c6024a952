"""How many batches are held out depends on the model's time; resuming keeps it."""

import itertools
import subprocess
import sys

import pytest

from minipeft.errors import InputError
from minipeft.lab import chapter as chapters
from minipeft.lab import held_out, task
from minipeft.lab.chapter import start


@pytest.fixture(autouse=True)
def _as_before():
    count = len(chapters.FIGURES)
    yield
    del chapters.FIGURES[count:]


def timed(monkeypatch, seconds):
    """Let every batch take this long."""
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(held_out.time, "perf_counter", lambda: next(clock))


@pytest.mark.parametrize(
    ("a_batch", "count"), [(2.0, 20), (1e-3, 114), (60.0, held_out.FEWEST)]
)
def test_as_many_are_held_out_as_the_time_allows(tiny, monkeypatch, a_batch, count):
    timed(monkeypatch, a_batch)
    whole = task.dictionary()
    assert len(whole.validation) == 114
    found = held_out.sized(whole, tiny.model, tiny.tokenizer, seconds=10.0)
    chosen = found.task.validation
    assert len(chosen) == count
    assert found.seconds == pytest.approx(count * a_batch / held_out.ROWS)
    assert str(found).startswith(f"held out: {count} of 114 examples, ")
    assert found.task.train == whole.train
    places = [whole.validation.index(pair) for pair in chosen]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert max(gaps) - min(gaps) <= 1
    assert places[-1] >= 114 - max(gaps) - 1


def test_a_given_number_is_not_timed(tiny, monkeypatch):
    monkeypatch.delattr(held_out.time, "perf_counter")
    found = held_out.sized(task.dictionary(), None, tiny.tokenizer, count=9)
    assert str(found) == "held out: 9 of 114 examples"
    for count in (0, 115):
        with pytest.raises(
            InputError, match=f"--held-out is {count}, .* at most 114 .* give 1 to 114"
        ):
            held_out.sized(task.dictionary(), None, tiny.tokenizer, count=count)


def test_a_chapter_holds_out_what_it_is_told_and_keeps_it_when_resumed(
    tmp_path, capsys
):
    kept = ["--checkpoint", str(tmp_path)]
    first = start("01_lora", 30, arguments=[*kept, "--held-out", "7"])
    assert not first.usual
    loaded = first.load()
    assert capsys.readouterr().out == "held out: 7 of 114 examples\n"
    first.load()  # the first model's time decided
    assert capsys.readouterr().out == ""
    again = start("01_lora", 30, arguments=[*kept, "--held-out", "5", "--resume"])
    again.load()
    assert again.task.validation == first.task.validation
    batches = first.task.held_out(loaded.tokenizer)
    assert sum(len(batch["labels"]) for batch in batches) == 7
    (tmp_path / held_out.KEPT).write_text("{")
    with pytest.raises(InputError, match=r"held-out\.json is not what a run wrote"):
        start("01_lora", 30, arguments=[*kept, "--resume"]).load()


def test_a_second_process_writes_nothing_beside_a_run_that_has_saved_nothing(tmp_path):
    kept = ["--checkpoint", str(tmp_path)]
    start("01_lora", 30, arguments=[*kept, "--held-out", "7"]).load()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert held_out.KEPT in before
    second = (
        "import sys; from minipeft.lab.chapter import start\n"
        "start('01_lora', 30, arguments=sys.argv[1:]).load()"
    )
    command = [sys.executable, "-c", second, *kept, "--held-out", "5"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode
    assert f"another process writes {tmp_path}; wait for it, or choose" in ran.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    start("01_lora", 30, arguments=[*kept, "--held-out", "6"]).load()  # of this process
    assert held_out.kept_count(tmp_path) == 6


def test_tiny_is_judged_on_all_and_length_is_an_option():
    usual = start("01_lora", 30, arguments=[])
    loaded = usual.load()
    assert len(usual.task.validation) == 114
    assert usual.task.length == task.LENGTH
    short = start("01_lora", 30, arguments=["--length", "20"])
    short.load()
    assert short.task.length == 20
    batch = short.task.training(loaded.tokenizer, rows=8)(0)
    assert batch["labels"].shape == (8, 20)
    with pytest.raises(InputError, match="--held-out is 0; give at least 1"):
        start("01_lora", 30, arguments=["--held-out", "0"])
