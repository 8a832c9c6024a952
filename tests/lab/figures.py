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


CHECKPOINTS = {
    "cut": "The end of a checkpoint is cut off.",
    "a bit of the header": "A bit in the header of a checkpoint is flipped.",
    "a bit of the data": "A bit in the data of a checkpoint is flipped.",
}
ADAPTERS = {
    "truncated": "One of an adapter's two files is cut off.",
    "longer": "Bytes follow the weights of an adapter.",
    "broken_header": "A bit in the length of the weights' header is flipped.",
    "broken_text": "The configuration is not UTF-8.",
    "key_twice": "The configuration has a setting twice.",
    "tensor_twice": "The weights have a tensor twice.",
    "not_finite": "A tensor holds NaN or an infinity.",
    "lost_tensor": "A tensor is missing.",
    "foreign_tensor": "A tensor belongs to no layer.",
    "other_shape": "A tensor has another shape.",
    "whole_numbers": "A tensor holds integers.",
    "renamed": "A tensor has another name.",
    "odd_setting": "A setting has a value that it cannot have.",
    "odd_json": "The configuration is not a JSON object of settings.",
    "absent": "A file is missing, or is a folder or a link to nothing.",
    "pickled": "The weights are a pickle.",
    "oversized": "A file is larger than any adapter's.",
}
WRAPPERS = {
    "offloaded": "All weights lie elsewhere and come in for a call",
    "sharded": "FSDP shards the adapters and the bases",
    "hooked": "Hooks count the calls of every adapter",
    "base hooked": "Hooks look at the calls of the wrapped layers",
    "parametrized": "Each trained tensor is computed from another one",
    "cast by the instance": "A layer has a forward of its own, which casts the weight",
    "copied": "The model is a deep copy",
    "pickled": "The model has gone through pickle",
}
STATES = {
    "autocast": "autocast to bfloat16",
    "inference mode": "inference mode",
    "no gradients": "`no_grad`",
    "deterministic": "deterministic algorithms",
    "default dtype": "float64 as the default dtype",
    "default device": "another default device",
}


def damages() -> dict[str, int]:
    """Return the number of refused damaged files of each kind."""
    drawn = Counter(kind for kind, _ in checkpoints.damaged_files(bytes(8 + 99)))
    kinds = {CHECKPOINTS[kind]: n for kind, n in sorted(drawn.items())}
    forgeries = len(checkpoints.FORGERIES)
    kinds["A field of a checkpoint does not fit the model."] = forgeries
    each = Counter(
        folders.DAMAGES[i % len(folders.DAMAGES)].__name__ for i in range(folders.EACH)
    )
    for name, n in each.items():
        kinds[ADAPTERS[name]] = n * len(folders.METHODS)
    flips = folders.FLIPS * len(folders.METHODS)
    kinds["A bit in the data of an adapter's weights is flipped."] = flips
    return kinds


def kills() -> dict[str, int]:
    """Return the number of signals that stop a save or a training step."""
    signals = ", ".join(number.name for number in checkpoints.SIGNALS)
    caught = ", ".join(number.name for number in runs.SIGNALS)
    return {
        f"A signal ({signals}) comes before or after a call of a save. The old file or "
        "the new one is there.": 2 * len(checkpoints.CALLS) * len(checkpoints.SIGNALS),
        f"A signal ({caught}) comes in a part of a training step. Whole steps are "
        "saved, and the run goes on as if it had never stopped.": len(runs.POINTS)
        * len(runs.SIGNALS),
    }


def programs_around() -> dict[str, int]:
    """Return the number of rows that ran in each global state and each wrapper."""
    rows, merges = len(programs.ROWS), len(programs.MERGE)
    found = {f"{WRAPPERS[name]}.": rows for name in programs.WRAPPERS}
    found |= {
        f"{WRAPPERS[n]}; the adapters are merged.": merges for n in programs.MERGED
    }
    for name in programs.AMBIENT:
        found[f"The adapters are started and merged under {STATES[name]}."] = rows
    found |= {f"The model computes under {STATES[n]}.": rows for n in programs.FORWARD}
    found["A wrapper and a state come together."] = len(programs.PAIRS)
    return found


def table(title: str, counts: Mapping[str, int]) -> str:
    """Draw one table, with the sum of its counts."""
    lines = [f"| {title} | cases |", "|:--|--:|"]
    lines += [f"| {name} | {n:,} |" for name, n in counts.items()]
    return "\n".join([*lines, f"| **all** | **{sum(counts.values()):,}** |", ""])


def page() -> str:
    """Return the page."""
    tables = (
        table(
            "A damaged file is refused in one sentence, and the model stays as it was",
            damages(),
        ),
        table("A run is stopped, and nothing is lost", kills()),
        table(
            "A program wraps the model, and its values stay the same", programs_around()
        ),
        f"The methods are {', '.join(programs.ROWS)}.\n",
    )
    return "\n".join([HEAD, *tables])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
