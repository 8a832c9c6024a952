import errno
import json
import os
import re
import subprocess
import sys
import textwrap

import matplotlib as mpl
import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab import chapter as chapters
from minipeft.lab import plots
from minipeft.lab.chapter import start
from minipeft.lab.train import Interrupted


@pytest.fixture(autouse=True)
def _as_before():
    hook, count = sys.excepthook, len(chapters.FIGURES)
    with mpl.rc_context():
        yield
    sys.excepthook = hook
    del chapters.FIGURES[count:]


def test_options_have_the_chapter_s_defaults():
    chapter = start("01_lora", steps=30, arguments=[])
    assert (chapter.name, chapter.model, chapter.steps) == ("01_lora", "tiny", 30)
    assert chapter.out.as_posix() == "build/chapters/01_lora"
    assert chapter.full is False
    assert chapter.device in ("cpu", "cuda")


def test_options_are_read(tmp_path):
    line = ["--steps", "5", "--device", "cpu", "--out", str(tmp_path), "--full"]
    chapter = start("01_lora", steps=30, arguments=line)
    assert (chapter.steps, chapter.device, chapter.full) == (5, "cpu", True)
    assert chapter.out == tmp_path


def test_the_seed_and_one_thread_are_set():
    start("01_lora", steps=30, arguments=[])
    first = torch.rand(3)
    start("01_lora", steps=30, arguments=[])
    assert torch.equal(torch.rand(3), first)
    assert torch.get_num_threads() == 1


def test_what_a_chapter_adds_to_a_figure_can_be_turned_dark(tmp_path):
    chapter = start("01_lora", steps=1, arguments=["--out", str(tmp_path)])
    figure, ax = plots.axes()
    ax.plot([1, 2], label="a line")
    ax.legend()
    ax.text(0, 1, "a word")
    path = chapter.show(figure, "line", "A line that rises.")
    known = {*plots.PALETTE, plots.INK, plots.FAINT}
    assert set(re.findall("#[0-9a-f]{6}", path.read_text())) <= known


def test_show_writes_figure_and_text_and_remembers(tmp_path, capsys):
    chapter = start("01_lora", steps=1, arguments=["--out", str(tmp_path)])
    figure, ax = plots.axes("Title")
    ax.plot([1, 2])
    path = chapter.show(figure, "line", "A line that rises.", "It rises by 1.")
    assert path == tmp_path / "line.svg"
    assert path.read_bytes().startswith(b"<?xml")
    assert json.loads((tmp_path / "line.json").read_text()) == {
        "alt": "A line that rises."
    }
    assert chapters.FIGURES[-1] == (path, "A line that rises.", "It rises by 1.")
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{path}\n")
    assert not figure.axes
    with pytest.raises(InputError, match="no alternative text"):
        chapter.show(figure, "line", " ")


def test_a_long_run_is_read_or_missed_in_one_sentence(tmp_path):
    chapter = start("17_side_by_side", steps=1, arguments=[])
    path = tmp_path / "17_side_by_side.json"
    with pytest.raises(
        InputError, match=r"17_side_by_side\.json is not here; .*--full"
    ):
        chapter.read_full(path)
    path.write_text('{"seconds": 3')
    with pytest.raises(InputError, match=r"is damaged \(.*\); .*--full"):
        chapter.read_full(path)
    path.write_text('{"seconds": 3}')
    assert chapter.read_full(path) == {"seconds": 3}


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        start("01_lora", steps=30, arguments=["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for word in ("--model", "--device", "--steps", "--out", "--full", "default: 30"):
        assert word in shown


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["--model", "tinny"], "no model 'tinny' .* choose tiny, smollm2, a folder"),
        (["--model", "minilm"], "minilm does not write text; choose tiny, smollm2, a"),
        (["--steps", "0"], "--steps is 0; give at least 1"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--device", "tpu"], "there is no device 'tpu'; choose auto, cpu, cuda"),
        (["--speed"], "unrecognized arguments: --speed"),
        (["--threads", "0"], "--threads is 0; give at least 1"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--resume"], "--resume needs --checkpoint FOLDER"),
    ],
)
def test_bad_options_are_one_sentence(line, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        start("01_lora", steps=30, arguments=line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--out", "--checkpoint"])
@pytest.mark.parametrize("below", ["", "/run"])
def test_a_folder_that_cannot_be_is_refused_before_the_run(option, below, tmp_path):
    (tmp_path / "file").write_text("")
    place = f"{tmp_path}/file{below}"
    sentence = f"^{option} is {place}, and {tmp_path}/file is a file; choose another$"
    with pytest.raises(InputError, match=sentence):
        start("01_lora", steps=30, arguments=[option, place])


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    sentence = f"^--out is {tmp_path}/new, and {tmp_path} cannot be written; choose"
    with pytest.raises(InputError, match=sentence):
        start("01_lora", steps=30, arguments=["--out", f"{tmp_path}/new"])


def test_a_chapter_s_process_ends_with_one_line_and_code_2():
    code = """
        from minipeft.lab.chapter import start
        print("before")
        chapter = start(name="00_test", steps=3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "--model", "tinny"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("there is no model 'tinny' on this machine; choose tiny")
    assert done.stdout == "before\n"


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("what and why"), 2, "what and why"),
        (OSError(errno.ENOSPC, "full"), 2, "the disk is full; free some space"),
        (KeyboardInterrupt(), 130, "stopped; nothing is half-written"),
        (Interrupted("stopped after step 4"), 130, "stopped after step 4"),
    ],
)
def test_expected_ends_are_one_line(error, code, sentence, capsys):
    start("00_test", steps=3, arguments=[])
    with pytest.raises(SystemExit) as caught:
        sys.excepthook(type(error), error, None)
    assert caught.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(sentence)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (True, "stopped after step 4; run the same command with --resume"),
        (False, "stopped after step 4; with --checkpoint FOLDER a run keeps what "),
    ],
)
def test_an_interrupted_run_names_the_option_that_goes_on(kept, says, capsys):
    start("00_test", steps=3, arguments=[])
    error = Interrupted("stopped after step 4")
    error.kept = kept
    with pytest.raises(SystemExit) as caught:
        sys.excepthook(Interrupted, error, None)
    assert caught.value.code == 130
    assert capsys.readouterr().err.startswith(says)


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), OSError(5, "I/O")])
def test_defects_keep_their_traceback(error, capsys):
    start("00_test", steps=3, arguments=[])
    sys.excepthook(type(error), error, None)
    assert type(error).__name__ in capsys.readouterr().err
