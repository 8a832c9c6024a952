"""The page of bugs: each entry says whether this build has seen it."""

import json
from pathlib import Path

import pytest
from book import Folders, bugs

ROOT = Path(__file__).parents[2]
ENTRY = "**lib 1.0: wrong.** Told in\ntwo lines: `lora_merge:1`,\n`lora_merge:30`."
PAGE = f"# Bugs\n\nNo entry.\n\n{ENTRY}\n\n## More\n"
TOLD = bugs.Told("lib", "1.0", ("lora_merge:1", "lora_merge:30"), "2026-01-02")
RESULT = "[the result of 2026-01-02](matrix.md#lib)"
BOTH = dict.fromkeys(TOLD.vectors, "fail")
# It crashes where minipeft answers, and refuses as minipeft does.
DRIVER = """
import os


def lora_merge(W, A, B, alpha, rank_stabilized):
    if len(B) != len(W):
        raise ValueError("B does not fit")
    print("which is no answer", flush=True)
    os.abort()
"""


@pytest.fixture
def layout(tmp_path):
    result = {"date": "2026-01-02", "operations": {"lora_merge": {"failed": [1, 30]}}}
    files = {
        "results/lib/1.0.json": json.dumps(result),
        "tools/matrix.py": "LIBRARIES = {'lib': 'lib_driver'}\n",
        "tools/implementations/lib_driver.py": DRIVER,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Folders(tmp_path)


@pytest.fixture
def version(monkeypatch):
    return lambda number: monkeypatch.setattr(bugs, "installed", lambda _: number)


def no_process(*_, **__):
    raise AssertionError("it starts a process")


def test_an_entry_says_what_this_build_saw(layout, version, monkeypatch):
    version("1.0")
    line = (
        "Reproduced in this build: lib 1.0 fails 1 of 2 vectors; "
        f"{RESULT} has the others.\n{{ .shown }}"
    )
    wanted = PAGE.replace(ENTRY, f"{ENTRY}\n\n{line}")
    assert bugs.page(PAGE, layout) == wanted
    monkeypatch.setattr(bugs.subprocess, "run", no_process)
    assert bugs.page(PAGE, layout) == wanted  # which is kept
    (layout.root / "tools/implementations/lib_driver.py").write_text("")
    with pytest.raises(AssertionError, match="starts a process"):
        bugs.page(PAGE, layout)


@pytest.mark.parametrize("number", ["", "1.1"])
def test_without_the_library_no_process_is_started(
    layout, version, number, monkeypatch
):
    version(number)
    monkeypatch.setattr(bugs.subprocess, "run", no_process)
    assert f"{RESULT} shows it.\n{{ .shown }}" in bugs.page(PAGE, layout)


@pytest.mark.parametrize("text", ["raise SystemError", "import os; os.abort()"])
def test_a_library_that_cannot_run_leaves_the_build_green(layout, version, text):
    version("1.0")
    (layout.root / "tools/implementations/lib_driver.py").write_text(text)
    told = bugs.page(PAGE, layout)
    assert f"This build did not run lib 1.0; {RESULT} shows it." in told


@pytest.mark.parametrize(
    ("number", "verdicts", "said"),
    [
        ("", {}, f"This build has no lib; {RESULT} shows it."),
        ("1.1", {}, f"This build has lib 1.1; {RESULT} shows it."),
        ("1.0", {}, f"This build did not run lib 1.0; {RESULT} shows it."),
        ("1.0", BOTH, "Reproduced in this build: lib 1.0 fails both vectors."),
        (
            "1.0",
            dict.fromkeys(TOLD.vectors, "skip"),
            f"Not reproduced in this build, by lib 1.0; {RESULT} shows it.",
        ),
    ],
)
def test_a_line_says_what_shows_the_bug(number, verdicts, said, version):
    version(number)
    assert bugs.shown(TOLD, {"lib": verdicts}) == said


def test_every_entry_of_the_page_has_a_library_and_its_vectors():
    stories = bugs.STORY.findall((ROOT / "site" / "bugs.md").read_text("utf-8"))
    assert len(stories) >= 20
    for story in stories:
        told = bugs.told(story, Folders(ROOT))
        named = {vector for one in told for vector in one.vectors}
        assert named == set(bugs.VECTOR.findall(story.replace("\n", " "))), story
        assert all(one.vectors for one in told), story
