import errno
import json
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab import chapter as chapters
from minipeft.lab import plots
from minipeft.lab.chapter import start


@pytest.fixture(autouse=True)
def _as_before():
    hook, count = sys.excepthook, len(chapters.FIGURES)
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


def test_show_writes_figure_and_text_and_remembers(tmp_path, capsys):
    chapter = start("01_lora", steps=1, arguments=["--out", str(tmp_path)])
    figure, ax = plots.axes("Title")
    ax.plot([1, 2])
    path = chapter.show(figure, "line", "A line that rises.")
    assert path == tmp_path / "line.svg"
    assert path.read_bytes().startswith(b"<?xml")
    assert json.loads((tmp_path / "line.json").read_text()) == {
        "alt": "A line that rises."
    }
    assert chapters.FIGURES[-1] == (path, "A line that rises.")
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{path}\n")
    assert not figure.axes
    with pytest.raises(InputError, match="no alternative text"):
        chapter.show(figure, "line", " ")


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
        (["--model", "tinny"], "there is no model 'tinny'"),
        (["--steps", "0"], "--steps is 0; give at least 1"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_bad_options_are_one_sentence(line, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        start("01_lora", steps=30, arguments=line)
    assert "\n" not in str(caught.value)


def run(body, *arguments):
    """Run a chapter with this body in an interpreter of its own."""
    code = textwrap.dedent(
        """
        import errno, os, signal
        from minipeft.errors import InputError
        from minipeft.lab.chapter import start
        chapter = start(name="00_test", steps=3)
        print("before")
        """
    )
    return subprocess.run(
        [sys.executable, "-c", code + textwrap.dedent(body), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "arguments", "code", "sentence"),
    [
        ("", ("--model", "tinny"), 2, "there is no model 'tinny' on this machine"),
        ("raise OSError(errno.ENOSPC, 'full')", (), 2, "the disk is full"),
        ("os.kill(os.getpid(), signal.SIGINT)", (), 130, "stopped"),
    ],
)
def test_errors_end_a_chapter_with_one_line(body, arguments, code, sentence):
    done = run(body, *arguments)
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith(sentence)
    assert done.stdout == ("" if arguments else "before\n")


def test_a_defect_keeps_its_traceback():
    done = run("1 / 0")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stdout == "before\n"


def test_other_system_errors_keep_their_traceback(capsys):
    error = OSError(errno.EIO, "input/output error")
    chapters._calm(OSError, error, None)
    assert "input/output error" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
