"""What is refused and what survives, counted: the figures that the tests must reach.

`python -m tests.lab.figures` writes the page of the book. Each count is of the cases
that the named test runs, so a case that fails there fails the page.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.interop import test_peft_damage as folders
from tests.lab import test_checkpoint_damage as checkpoints
from tests.lab import test_resume as runs
from tests.properties import test_torch_programs as programs

PAGE = Path(__file__).parents[2] / "site" / "figures.md"

HEAD = """# What is refused, and what survives

Each number counts cases that a test runs, and the test demands all of them.
`python -m tests.lab.figures` writes this page, and a test compares it.
"""


def damages() -> dict[str, int]:
    """Return how many damaged files of each kind are refused, the model untouched."""
    drawn = Counter(kind for kind, _ in checkpoints.damaged_files(bytes(8 + 99)))
    kinds = {f"a checkpoint: {kind}": n for kind, n in sorted(drawn.items())}
    kinds["a checkpoint: a field that does not fit"] = len(checkpoints.FORGERIES)
    each = Counter(
        folders.DAMAGES[i % len(folders.DAMAGES)].__name__ for i in range(folders.EACH)
    )
    for name, n in each.items():
        kind = name.replace("_", " ")
        kinds[f"a folder of an adapter: {kind}"] = n * len(folders.METHODS)
    return kinds


def kills() -> dict[str, int]:
    """Return how often a save and a step are stopped."""
    signals = ", ".join(number.name for number in checkpoints.SIGNALS)
    caught = ", ".join(number.name for number in runs.SIGNALS)
    return {
        f"a save, before and after each of its calls ({signals}): the old or the new "
        "file": 2 * len(checkpoints.CALLS) * len(checkpoints.SIGNALS),
        f"a step of training, in each of its parts ({caught}): whole steps, and the "
        "run goes on as if never stopped": len(runs.POINTS) * len(runs.SIGNALS),
    }


def programs_around() -> dict[str, int]:
    """Return how many rows were run under each state and each wrapper."""
    rows, merges = len(programs.ROWS), len(programs.MERGE)
    found = {f"wrapped: {name}": rows for name in programs.WRAPPERS}
    found |= {f"merged, wrapped: {name}": merges for name in programs.MERGED}
    found |= {f"started and merged under: {name}": rows for name in programs.AMBIENT}
    found |= {f"computed under: {name}": rows for name in programs.FORWARD}
    found["pairs of a wrapper and a state"] = len(programs.PAIRS)
    return found


def table(title: str, counts: Mapping[str, int]) -> str:
    """Draw one table, with the sum of its counts."""
    lines = [f"| {title} | cases |", "|:--|--:|"]
    lines += [f"| {name} | {n:,} |" for name, n in counts.items()]
    return "\n".join([*lines, f"| **all** | **{sum(counts.values()):,}** |", ""])


def page() -> str:
    """Return the page."""
    tables = (
        table("damaged: one sentence, the model untouched", damages()),
        table("stopped", kills()),
        table("in other programs: the values of the plain model", programs_around()),
        f"Rows: {', '.join(programs.ROWS)}.\n",
    )
    return "\n".join([HEAD, *tables])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
