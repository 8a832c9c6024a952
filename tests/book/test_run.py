"""Chapters run once, in a clean interpreter, and again only after a change."""

import json
import time
from pathlib import Path

import pytest
from book import BookError, run


def entries(small):
    folder = small.layout.cache / "chapters"
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def alive(process):
    """Return whether a process runs; a zombie, which nobody waited for, does not."""
    stat = Path("/proc", str(process), "stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_a_failing_cell_is_named_with_its_traceback(small):
    small.chapter("# %%\nx = 1\n\n# %%\ny = 2\nraise RuntimeError('too hot')\n")
    with pytest.raises(BookError) as caught:
        small.build()
    message = str(caught.value)
    assert "chapters/01_lora.py, cell 3 (line 8), failed" in message
    assert 'line 9, in <module>\n    raise RuntimeError("too hot")' in message.replace(
        "'", '"'
    )
    assert "cells.py" not in message
    assert entries(small) == ["01_lora-" + entries(small)[0].split("-")[1]]
    assert entries(small)[0].endswith(".partial")


@pytest.mark.parametrize("end", ["raise SystemExit(0)", "import os; os._exit(3)"])
def test_a_chapter_that_leaves_early_fails(small, end):
    small.chapter(f"# %%\n{end}\n")
    with pytest.raises(BookError, match=r"cell 2 \(line 5\), failed"):
        small.build()


def test_the_second_build_runs_nothing(small):
    path = small.chapter(
        "# %%\nimport pathlib\npathlib.Path(__file__ + '.ran').touch()"
    )
    small.build()
    ran = path.with_suffix(".py.ran")
    ran.unlink()
    before = small.page()
    small.build()
    assert not ran.exists()
    assert small.lines[-1] == "1 chapters, 1 unchanged"
    assert small.page() == before


def test_prose_alone_runs_nothing_code_and_library_do(small):
    path = small.chapter("# %% [markdown]\n# Old.\n\n# %%\nprint('one')\n")
    small.build()
    path.write_text(path.read_text().replace("Old", "New\n#\n# and longer"))
    small.build()
    assert small.lines[-1] == "1 chapters, 1 unchanged"
    assert "New" in small.page()
    path.write_text(path.read_text().replace("'one'", "'two'"))
    small.build()
    assert "01_lora ran in" in small.lines[-1]
    small.write("minipeft/reference/new.py", "x = 1")
    small.build()
    assert "01_lora ran in" in small.lines[-1]
    small.write("chapters/results/01_lora.json", "{}")
    small.build()
    assert "01_lora ran in" in small.lines[-1]


def test_old_entries_are_removed(small):
    path = small.chapter("# %%\nprint('one')\n")
    small.build()
    (first,) = entries(small)
    path.write_text(path.read_text().replace("'one'", "'two'"))
    small.build()
    (second,) = entries(small)
    assert first != second


def test_a_chapter_over_its_time_is_stopped_with_its_children(small, monkeypatch):
    monkeypatch.setenv("BOOK_SLOWNESS", "0.02")
    small.chapter(
        """
        # %%
        import pathlib, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pathlib.Path(__file__ + ".child").write_text(str(child.pid))

        # %%
        child.wait()
        """
    )
    began = time.monotonic()
    with pytest.raises(BookError, match=r"more than 1\.2 s and was stopped in cell 3"):
        small.build()
    assert time.monotonic() - began < 30
    child = int((small.layout.chapters / "01_lora.py.child").read_text())
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_each_chapter_has_its_own_interpreter(small):
    small.chapter("# %%\nimport json\njson.mine = 1\nx = 1\n", "01_one")
    small.chapter(
        "# %%\nimport json\nprint(hasattr(json, 'mine'), 'x' in dir())\n", "02_two"
    )
    small.build()
    assert "False False" in small.page("02_two")


def test_what_a_script_sees(small):
    small.chapter(
        """
        # %%
        import inspect, sys, pathlib
        def f(): return "seen"
        print(__name__, pathlib.Path(__file__).name, pathlib.Path(sys.path[0]).name)
        print(sys.argv[1], sys.modules["__main__"].f is f)
        print(inspect.getsource(f).strip())
        """
    )
    small.build()
    page = small.page()
    assert "__main__ 01_lora.py chapters\n--out True\ndef f(): return" in page


def test_child_processes_print_into_their_cell_and_errors_into_the_log(small):
    small.chapter(
        """
        # %%
        import subprocess, sys
        print("before", flush=True)
        subprocess.run(["echo", "from a child"], check=True)
        print("after")
        print("a warning", file=sys.stderr)
        """
    )
    small.build()
    assert "before\nfrom a child\nafter\n" in small.page()
    output = small.page().split("{ .text .output")[1]
    assert "a warning" not in output
    log = small.layout.cache / "chapters" / "01_lora.log"
    assert "a warning" in log.read_text()


def test_after_a_failure_no_other_chapter_begins(small):
    small.chapter("# %%\nraise ValueError\n", "01_a")
    small.chapter("# %%\nimport time; time.sleep(1)\n", "02_b")
    for n in range(3, 9):
        small.chapter("# %%\nimport time; time.sleep(1)\n", f"{n:02d}_c")
    with pytest.raises(BookError, match="01_a"):
        small.build()
    begun = {name.split("-")[0] for name in entries(small)}
    assert len(begun) <= 1 + run.AT_A_TIME


def test_the_cost_is_on_the_page_and_not_in_the_report(small):
    small.chapter("# %%\nprint('deterministic')\n")
    book = small.build()
    result = book.results["01_lora"]
    assert f"Ran in {result.seconds:.1f} s on one CPU core" in small.page()
    assert "seconds" not in json.dumps(result.report)
