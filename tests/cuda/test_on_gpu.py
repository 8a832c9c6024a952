"""`make test-gpu`, with the GPU and the programs that it starts replaced by notes."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from minipeft.cupy import executor
from tests.cuda import on_gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def started(monkeypatch):
    """Note what is started; a program whose name is in `failing` fails."""
    commands, failing = [], set()

    def run(command, check):
        commands.append(command)
        return SimpleNamespace(returncode=int(bool(failing & set(command))))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(on_gpu, "missing", lambda: None)
    return SimpleNamespace(commands=commands, failing=failing)


def test_without_a_gpu_one_line_and_no_failure(started, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "missing", lambda: "There is no GPU.")
    for arguments, code in (([], 0), (["--small"], 1)):  # lost under a sanitizer
        assert on_gpu.main(arguments) == code
        assert capsys.readouterr().out == "test-gpu: nothing ran. There is no GPU.\n"
    assert started.commands == []


def test_with_a_gpu_everything_runs(started, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "find_sanitizer", lambda: Path("/cuda/sanitizer"))
    assert on_gpu.main([]) == 0
    texts = [" ".join(command) for command in started.commands]
    for expected in (
        "pytest -q -m gpu tests",
        "minipeft.cli verify cupy",
        "minipeft.cli verify torch --device cuda",
        *(
            f"/cuda/sanitizer --error-exitcode 1 --tool {tool} "
            f"{on_gpu.PYTHON} -m tests.cuda.on_gpu --small"
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
        ),
    ):
        assert sum(text.endswith(expected) for text in texts) == 1
    assert capsys.readouterr().out.endswith("all passed\n")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("pytest", "agreement"),
        ("cupy", "vectors, cupy"),
        ("torch", "vectors, torch"),
        ("racecheck", "racecheck"),
    ],
)
def test_one_failure_is_named_and_the_rest_runs(
    started, monkeypatch, capsys, word, name
):
    monkeypatch.setattr(on_gpu, "find_sanitizer", lambda: Path("/cuda/sanitizer"))
    started.failing.add(word)
    assert on_gpu.main([]) == 1
    assert len(started.commands) == 7
    assert capsys.readouterr().out.endswith(f"failed: {name}\n")


def test_a_missing_sanitizer_is_one_line(started, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "find_sanitizer", lambda: None)
    assert on_gpu.main([]) == 0
    assert len(started.commands) == 3
    lines = [x for x in capsys.readouterr().out.splitlines() if "sanitizer" in x]
    assert len(lines) == 1
    assert "`pip install nvidia-cuda-sanitizer-api`" in lines[0]


def test_the_sanitizer_of_the_wheel_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu.shutil, "which", lambda _: None)
    monkeypatch.setattr(on_gpu, "TOOLKIT", tmp_path / "no toolkit")
    monkeypatch.setattr(on_gpu, "TOOLS", tmp_path)
    binary = tmp_path / "compute-sanitizer"
    assert on_gpu.find_sanitizer() is None
    binary.touch()
    assert on_gpu.find_sanitizer() == binary


def test_under_a_sanitizer_every_row_runs_without_a_pool(started, monkeypatch):
    told, ran = [], []
    cuda = SimpleNamespace(set_allocator=told.append)
    monkeypatch.setitem(on_gpu.sys.modules, "cupy", SimpleNamespace(cuda=cuda))

    def small(dtypes):
        assert isinstance(executor.current(), on_gpu.DeviceExecutor)
        ran.append(set(dtypes))

    rows = {name: SimpleNamespace(small=small) for name in on_gpu.ROWS}
    monkeypatch.setattr(on_gpu, "ROWS", rows)
    assert on_gpu.main(["--small"]) == 0
    assert told == [None]
    assert ran == [{"float32", "float16", "bfloat16"}] * len(rows)


def test_make_starts_it():
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.split("\ntest-gpu:")[1].split("\n\n")[0]
    assert recipe.splitlines()[1:] == ["\t@$(BIN)/python -m tests.cuda.on_gpu"]
