"""The progress of a run: the loss of each step, and what the mean is of."""

import io
from functools import partial

import pytest
from rich.console import Console

from minipeft.lab import progress

LAST = "loss 0.010  (mean of 3 steps 1.003)  validation 0.500  0 ms/step"


@pytest.fixture(autouse=True)
def _still(monkeypatch):
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 0.0)


def run(losses):
    with progress.bar(len(losses)) as shown:
        for at, loss in enumerate(losses):
            shown.validation = 0.5 if at == len(losses) - 1 else None
            shown.advance(loss)
        shown.note("a line that stays")


def test_a_line_has_the_loss_of_the_step_and_says_what_the_mean_is_of(capsys):
    run([2.0, 1.0, 0.01])
    assert capsys.readouterr().err.splitlines() == [
        "step 1/3  loss 2.000  0 ms/step  0 s left",
        "step 2/3  loss 1.000  (mean of 2 steps 1.500)  0 ms/step  0 s left",
        f"step 3/3  {LAST}  0 s left",
        "a line that stays",
    ]


def test_the_mean_is_of_the_last_steps_alone(capsys):
    run([100.0, *[1.0] * progress.MEAN_OF])
    last = capsys.readouterr().err.splitlines()[-2]
    assert f"loss 1.000  (mean of {progress.MEAN_OF} steps 1.000)" in last


def test_a_bar_on_a_terminal_shows_the_same(monkeypatch):
    screen = io.StringIO()
    made = partial(Console, file=screen, force_terminal=True, width=200)
    monkeypatch.setattr(progress, "Console", lambda stderr: made())
    run([2.0, 1.0, 0.01])
    assert LAST in screen.getvalue()
    assert "3/3" in screen.getvalue()
    assert "a line that stays" in screen.getvalue()
