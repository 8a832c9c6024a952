"""Run chapters, each once, in a clean interpreter; keep what they said by a hash."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import BookError, Folders
from .chapter import Chapter

RUNNER = Path(__file__).with_name("cells.py")
VERSIONS = ("numpy", "torch", "matplotlib")
AT_A_TIME = 2
ENVIRONMENT = {
    # One thread each: two chapters fill two cores, and sums keep their order.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "MPLBACKEND": "agg",
}


@dataclass(frozen=True)
class Result:
    """What one chapter left: its folder of figures, its cost, its cells' output."""

    folder: Path
    seconds: float
    report: dict[str, Any]

    @property
    def cells(self) -> list[dict[str, Any]]:
        """What each code cell printed and showed, in order."""
        found: list[dict[str, Any]] = self.report["cells"]
        return found

    @property
    def solutions(self) -> list[dict[str, Any]]:
        """The same for the code of the solutions."""
        found: list[dict[str, Any]] = self.report["solutions"]
        return found

    @property
    def values(self) -> dict[str, str]:
        """The text of each `{=expression=}`."""
        found: dict[str, str] = self.report["values"]
        return found

    @property
    def quantities(self) -> list[list[str]]:
        """Each label with its value, in the order in which they were printed."""
        found: list[list[str]] = self.report["quantities"]
        return found


def run_all(
    layout: Folders, chapters: list[Chapter], say: Callable[[str], None] = print
) -> dict[str, Result]:
    """Run what has changed, two at a time; forget what no chapter needs any more."""
    library = digest_of_library(layout)
    folders = {c.name: folder_of(layout, c, library) for c in chapters}
    todo = [c for c in chapters if not (folders[c.name] / "cost.json").exists()]
    if chapters:
        say(f"{len(chapters)} chapters, {len(chapters) - len(todo)} unchanged")
    _run(todo, folders, say)
    _prune(layout, set(folders.values()))
    return {name: _load(folder) for name, folder in folders.items()}


def digest_of_library(layout: Folders) -> str:
    """Hash every file that a chapter's output may depend on, and the versions."""
    state = hashlib.sha256()
    for path in sorted(layout.package.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            _feed(state, path.relative_to(layout.root).as_posix(), path.read_bytes())
    _feed(state, RUNNER.name, RUNNER.read_bytes())
    for name in VERSIONS:
        _feed(state, name, importlib.metadata.version(name).encode())
    _feed(state, "python", platform.python_version().encode())
    return state.hexdigest()


def folder_of(layout: Folders, chapter: Chapter, library: str) -> Path:
    """Name the folder for this chapter as it is now.

    The hash is of what runs: a change to the prose alone runs nothing again.
    """
    state = hashlib.sha256(library.encode())
    for cell in (*chapter.code, *chapter.solutions):
        _feed(state, "cell", cell.source.encode())
    for value in chapter.values:
        _feed(state, "value", value.encode())
    results = chapter.path.parent / "results" / f"{chapter.name}.json"
    _feed(state, "results", results.read_bytes() if results.exists() else b"")
    return layout.cache / "chapters" / f"{chapter.name}-{state.hexdigest()[:16]}"


def _feed(state: Any, name: str, data: bytes) -> None:
    state.update(f"{name}\0{len(data)}\0".encode())
    state.update(data)


def _run(
    todo: list[Chapter], folders: dict[str, Path], say: Callable[[str], None]
) -> None:
    """Run chapters; after the first that fails, begin no other."""
    pool = ThreadPoolExecutor(AT_A_TIME)
    running: set[subprocess.Popen[bytes]] = set()
    jobs = {pool.submit(run_one, c, folders[c.name], running): c for c in todo}
    try:
        for done, job in enumerate(as_completed(jobs), 1):
            seconds = job.result()
            say(f"[{done}/{len(todo)}] {jobs[job].name} ran in {seconds:.1f} s")
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            _kill(process)
        raise
    finally:
        pool.shutdown()


def run_one(
    chapter: Chapter, folder: Path, running: set[subprocess.Popen[bytes]]
) -> float:
    """Run one chapter into its folder, which appears only when all went well."""
    log = folder.parent / f"{chapter.name}.log"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    began = time.perf_counter()
    try:
        _execute(chapter, partial, log, running)
    except subprocess.TimeoutExpired:
        raise BookError(_too_slow(chapter, partial)) from None
    seconds = time.perf_counter() - began
    report = partial / "report.json"
    failure = _failure(report, partial)
    if failure:
        raise BookError(
            f"chapters/{chapter.path.name}, {failure['at']}, failed:\n\n"
            f"{failure['text'].rstrip()}\n\nStandard error is in {log}"
        )
    (partial / "cost.json").write_text(json.dumps({"seconds": seconds}))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return seconds


def _execute(
    chapter: Chapter, out: Path, log: Path, running: set[subprocess.Popen[bytes]]
) -> None:
    job = {
        "path": str(chapter.path.resolve()),
        "out": str(out.resolve()),
        "cells": [asdict(cell) for cell in chapter.code],
        "solutions": [asdict(cell) for cell in chapter.solutions],
        "values": chapter.values,
    }
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        running.add(process)
        try:
            process.communicate(json.dumps(job).encode(), chapter.limit * slowness())
        finally:
            _kill(process)
            running.discard(process)


def slowness() -> float:
    """How much slower than the two usual cores this machine may be."""
    return float(os.environ.get("BOOK_SLOWNESS", "1"))


def _failure(report: Path, partial: Path) -> dict[str, str] | None:
    """Say why a run failed, if it did: its report, or that it died without one."""
    if report.exists():
        found: dict[str, str] | None = json.loads(report.read_text("utf-8")).get(
            "failure"
        )
        return found
    return {"at": _reached(partial), "text": "The interpreter died without a word."}


def _too_slow(chapter: Chapter, partial: Path) -> str:
    return (
        f"chapters/{chapter.path.name} took more than {chapter.limit * slowness():g} s "
        f"and was stopped in {_reached(partial)}: scale its experiment down, or on a "
        f"slow machine set BOOK_SLOWNESS=3"
    )


def _reached(partial: Path) -> str:
    at = partial / "at.txt"
    return at.read_text() if at.exists() else "its start"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a chapter and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _prune(layout: Folders, wanted: set[Path]) -> None:
    for folder in (layout.cache / "chapters").glob("*-*"):
        if folder.is_dir() and folder not in wanted:
            shutil.rmtree(folder)


def _load(folder: Path) -> Result:
    report = json.loads((folder / "report.json").read_text("utf-8"))
    cost = json.loads((folder / "cost.json").read_text())
    return Result(folder, cost["seconds"], report)
