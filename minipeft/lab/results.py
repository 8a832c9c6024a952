"""What long runs leave in `chapters/results`, and how pages show it."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minipeft.lab.chapter import Chapter

LIBRARIES = ("minipeft", "numpy", "torch", "transformers")
BASES = {
    ("tiny", None): "",
    ("build/glassllm", None): "_glassllm",
    ("smollm2", 16): "_smollm2",
}
"""The model and `--held-out` of committed results, and the end of their file's name.

A model that is judged in a time and not on a number of examples gives other results on
another machine, so the number is a part of the command.
"""


def place(chapter: Chapter, folder: Path) -> Path:
    """Return where a long run writes: its committed file, or one beside the figures.

    What is in `BASES`, with the chapter's data, layers and dtype, has a committed file.

    Args:
        chapter: from `start`.
        folder: of the committed results.
    """
    chosen = (chapter.data, chapter.targets, chapter.length)
    base = (chapter.model, chapter.held_out)
    if base in BASES and not any(chosen) and chapter.dtype == "float32":
        return folder / f"{chapter.name}{BASES[base]}.json"
    return chapter.out / "full.json"


def record(
    chapter: Chapter, seeds: Sequence[int], seconds: float, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the results of a long run with what made them.

    Args:
        chapter: from `start`.
        seeds: of the runs.
        seconds: that the runs took.
        values: what was measured.
    """
    model = "" if chapter.model in ("", "tiny") else f" --model {chapter.model}"
    model += f" --held-out {chapter.held_out}" if chapter.held_out else ""
    versions = {"python": platform.python_version()}
    return {
        "command": f"python chapters/{chapter.name}.py{model} --full",
        "model": chapter.model,
        "versions": versions | {library: version(library) for library in LIBRARIES},
        "seeds": list(seeds),
        "seconds": seconds,
        **values,
    }


def origin(full: Mapping[str, Any]) -> str:
    """Return the lines that say how a long run was made.

    Args:
        full: from `record`.
    """
    versions = ", ".join(f"{name} {v}" for name, v in full["versions"].items())
    minutes = f"{full['seconds'] / 60:.1f} minutes"
    return f"{full['command']}\nseeds {full['seeds']}, {minutes}\n{versions}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return "mean ± half the distance between the smallest and the largest value"."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return Markdown: the first row is the head, the first column is on the left."""
    line = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], line, *rows[1:]))
