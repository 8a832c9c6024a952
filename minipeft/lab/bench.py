"""Timings against peft and bitsandbytes: in pairs, alternating, as ratios.

    python -m minipeft.lab.bench [--rounds 9] [--threads 1] [--only NAME] [--out FILE]

Each pair runs in one process on the CPU: one turn of ours, one of theirs, and so on, so
that a slow machine slows both. The table shows the median of each, and the median of
the turns' ratios with the smallest and the largest. A pair is timed only after its
results have been compared.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from minipeft.errors import InputError
from minipeft.lab.files import write_atomic
from minipeft.lab.timing import Pair, Timing, measure, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every pair, print the table, write JSON; return the exit code."""
    try:
        _bench(_parser().parse_args(arguments))
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (9)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--only", default="", help="pairs whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    return parser


def _bench(options: argparse.Namespace) -> None:
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; give at least 1")
    builders = _chosen(options.only)
    torch.set_num_threads(options.threads)
    rows: list[Timing] = []
    for build in builders:
        rows.append(measure(build(), options.rounds))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    facts = {
        "versions": {p: version(p) for p in ("torch", "peft", "bitsandbytes")},
        "threads": options.threads,
        "rounds": options.rounds,
        "rows": [asdict(row) for row in rows],
    }
    write_atomic(options.out, (json.dumps(facts, indent=1) + "\n").encode())
    print(table(rows))


def _chosen(only: str) -> list[Callable[[], Pair]]:
    try:
        from minipeft.lab.bench_files import PAIRS as OF_FILES
        from minipeft.lab.bench_model import PAIRS as OF_A_MODEL
        from minipeft.lab.bench_pairs import PAIRS
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; `pip install '.[peers]'` in the clone of "
            "minipeft brings it"
        ) from None
    pairs = PAIRS | OF_A_MODEL | OF_FILES
    chosen = [build for name, build in pairs.items() if only in name]
    if not chosen:
        raise InputError(f"no pair's name contains {only!r}; choose of {list(pairs)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
