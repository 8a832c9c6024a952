"""The pages about files are true: their commands run and print what the pages show."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PEFT, MAKE = ROOT / "site" / "peft.md", "make.py"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.DOTALL | re.M)
NEEDS = {"peft": "peft", "llama_cpp": "xllamacpp", "transformers": "bitsandbytes"}
PAGES = ("peft", "transformers", "vllm", "llama_cpp", "ollama")


@pytest.fixture
def folder(tmp_path):
    """Make an empty folder, and the commands of this source."""
    (tmp_path / "bin").mkdir()
    for name, how in {"minipeft": "-m minipeft", "python": ""}.items():
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {how} "$@"\n')
        command.chmod(0o755)
    return tmp_path


def shell(folder, script):
    """Run a command that a reader would type."""
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=folder,
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_is_what_happens(folder, page):
    pytest.importorskip(NEEDS.get(page, "torch"), reason=f"{page} needs it")
    text = (ROOT / "site" / f"{page}.md").read_text("utf-8")
    if page != "peft":  # the others refer to its program
        (program,) = (b for _, t, b in BLOCK.findall(PEFT.read_text()) if t == MAKE)
        with contextlib.chdir(folder):
            exec(compile(program, MAKE, "exec"), {})
    said, ran = "", 0
    for language, title, block in BLOCK.findall(text):
        if language == "python":
            (folder / title).write_text(block)
        elif title == "not run here":
            assert "not run here" in text.replace(title, "", 1)
        elif language == "sh":
            done = shell(folder, block)
            assert f"exit code {done.returncode}" == title, block + done.stderr
            said, ran = done.stdout, ran + 1
        else:
            assert block.strip() in said
    assert ran >= 3


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert all(f": {page}.md\n" in text for page in PAGES)
