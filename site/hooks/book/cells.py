"""Run one chapter's cells in this interpreter, which does nothing else.

`python cells.py < job.json`: the job names the chapter, its cells and the folder for
results. Only the standard library is imported here, so that the chapter starts clean.
Standard output is captured below Python, at the file descriptor: what a cell's child
processes print belongs to the cell too. Standard error is the parent's log.
"""

import json
import os
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

FAILED = 1


class CellError(Exception):
    """A cell that did not do what the page needs."""


class Capture:
    """Everything that goes to file descriptor 1 inside the `with` block."""

    def __enter__(self) -> "Capture":
        """Point the descriptor at a temporary file."""
        sys.stdout.flush()
        self.file = tempfile.TemporaryFile()
        self.saved = os.dup(1)
        os.dup2(self.file.fileno(), 1)
        return self

    def __exit__(self, *_: object) -> None:
        """Point it back, and read the file."""
        sys.stdout.flush()
        os.dup2(self.saved, 1)
        os.close(self.saved)
        self.file.seek(0)
        self.text = self.file.read().decode("utf-8", "replace")
        self.file.close()


def run_cell(cell: dict[str, Any], path: str, namespace: dict[str, Any]) -> str:
    """Run one cell with the line numbers of its script, and return what it printed."""
    padded = "\n" * (cell["line"] - 1) + cell["source"]
    with Capture() as capture:
        exec(compile(padded, path, "exec"), namespace)
    return capture.text


def new_figures(seen: int, out: Path) -> list[dict[str, str]]:
    """Return the figures shown since the last look: file, alternative text, caption."""
    module = sys.modules.get("minipeft.lab.chapter")
    shown = getattr(module, "FIGURES", [])[seen:]
    figures = []
    for path, alt, *caption in shown:
        file = Path(path).resolve()
        if file.suffix != ".svg" or not file.is_file():
            raise CellError(f"figure {file.name!r} is not an SVG file that exists")
        if not str(alt).strip():
            raise CellError(f"figure {file.name!r} has no alternative text")
        if not file.is_relative_to(out):
            raise CellError(f"figure {file.name!r} was not written below --out")
        name = str(file.relative_to(out))
        figures.append({"file": name, "alt": alt, "caption": "".join(caption)})
    return figures


def quantities() -> list[list[str]]:
    """Return what was printed below a label: the label, the value with its unit."""
    module = sys.modules.get("minipeft.lab.claims")
    return [list(pair) for pair in getattr(module, "QUANTITIES", [])]


def quote(expression: str, namespace: dict[str, Any]) -> str:
    """Format `expression[:format]` as an f-string would."""
    return str(eval(f"f'''{{{expression}}}'''", namespace))


def explain(error: BaseException, path: str) -> str:
    """Format a traceback that begins in the chapter, not in this file."""
    if isinstance(error, CellError):
        return str(error)
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def run(job: dict[str, Any], namespace: dict[str, Any]) -> dict[str, Any]:
    """Run cells, then solutions, then quoted expressions; `at` says how far it got."""
    out, path = Path(job["out"]).resolve(), job["path"]
    report: dict[str, Any] = {"cells": [], "solutions": [], "values": {}}
    at, seen = "", 0
    try:
        for kind, rooms in (("cell", "cells"), ("solution", "solutions")):
            for cell in job[rooms]:
                at = f"{kind} {cell['number']} (line {cell['line']})"
                (out / "at.txt").write_text(at)
                scope = namespace if kind == "cell" else dict(namespace)
                text = run_cell(cell, path, scope)
                figures = new_figures(seen, out)
                seen += len(figures)
                report[rooms].append({"stdout": text, "figures": figures})
        for expression in job["values"]:
            at = f"the quoted value {{={expression}=}}"
            report["values"][expression] = quote(expression, namespace)
        report["quantities"] = quantities()
    except BaseException as error:
        report["failure"] = {"at": at, "text": explain(error, path)}
    return report


def main() -> int:
    """Run the job on standard input as if its chapter were started by hand."""
    job = json.load(sys.stdin)
    chapter = types.ModuleType("__main__")
    chapter.__file__ = job["path"]
    sys.modules["__main__"] = chapter
    sys.argv = [job["path"], "--out", job["out"]]
    sys.path[0] = str(Path(job["path"]).parent)
    report = run(job, chapter.__dict__)
    Path(job["out"], "report.json").write_text(json.dumps(report, indent=1), "utf-8")
    return FAILED if "failure" in report else 0


if __name__ == "__main__":
    sys.exit(main())
