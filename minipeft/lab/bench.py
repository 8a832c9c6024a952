"""Timings against peft and bitsandbytes: in pairs, alternating, as ratios.

    python -m minipeft.lab.bench [--rounds 9] [--threads 1] [--only NAME] [--out FILE]

Each pair runs in one process on the CPU: one turn of ours, one of theirs, and so on, so
that a machine that slows down slows down both. What is printed is the median of each
and the median of the turns' ratios, with the smallest and the largest. A pair is timed
only after its results agreed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from minipeft.errors import InputError
from minipeft.lab.files import write_atomic

Turn = Callable[[], object]


@dataclass(frozen=True)
class Pair:
    """Two ways to do one thing: ours, theirs, and the ratio we set out to reach."""

    name: str
    against: str
    ours: Turn
    theirs: Turn
    target: float
    note: str = ""


@dataclass(frozen=True)
class Row:
    """What was measured: milliseconds, and the ratio ours / theirs."""

    name: str
    against: str
    ours: float
    theirs: float
    ratio: float
    smallest: float
    largest: float
    target: float
    note: str

    @property
    def reached(self) -> bool:
        """Whether the ratio is at most the target."""
        return self.ratio <= self.target


def measure(pair: Pair, rounds: int) -> Row:
    """Time a pair's turns, alternating and exchanging who goes first."""
    seconds: dict[Turn, list[float]] = {pair.ours: [], pair.theirs: []}
    for turn in seconds:
        turn()
    for i in range(rounds):
        order = [*seconds] if i % 2 else [*reversed(seconds)]
        for turn in order:
            began = time.perf_counter()
            turn()
            seconds[turn].append(time.perf_counter() - began)
    ours, theirs = seconds.values()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Row(
        name=pair.name,
        against=pair.against,
        ours=1e3 * statistics.median(ours),
        theirs=1e3 * statistics.median(theirs),
        ratio=statistics.median(ratios),
        smallest=min(ratios),
        largest=max(ratios),
        target=pair.target,
        note=pair.note,
    )


def check(what: str, distance: float, bound: float) -> None:
    """Refuse to time two things that do not compute the same.

    Raises:
        InputError: the relative distance is above its bound.
    """
    if not distance <= bound:
        raise InputError(
            f"{what}: the two results differ by {distance:.2e} of their size, allowed "
            f"are {bound:.2e}; timing them would compare different things"
        )


def table(rows: list[Row]) -> str:
    """Lay the rows out as Markdown."""
    lines = [
        "| what | against | ours, ms | theirs, ms | ratio | min to max | target | |",
        "|:--|:--|--:|--:|--:|:-:|--:|:--|",
    ]
    for row in rows:
        verdict = "reached" if row.reached else "**not reached**"
        lines.append(
            f"| {row.name} | {row.against} | {row.ours:.1f} | {row.theirs:.1f} "
            f"| {row.ratio:.2f} | {row.smallest:.2f} to {row.largest:.2f} "
            f"| {row.target:g} | {verdict}{f'; {row.note}' if row.note else ''} |"
        )
    return "\n".join(lines)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> int:
    """Measure every pair, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (9)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--only", default="", help="pairs whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args()
    from minipeft.lab.bench_pairs import PAIRS

    rows: list[Row] = []
    with threads(options.threads):
        for name, build in PAIRS.items():
            if options.only in name:
                pair = build()
                rows.append(measure(pair, options.rounds))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    facts = {
        "versions": {p: version(p) for p in ("torch", "peft", "bitsandbytes")},
        "threads": options.threads,
        "rounds": options.rounds,
        "rows": [asdict(row) for row in rows],
    }
    write_atomic(options.out, (json.dumps(facts, indent=1) + "\n").encode())
    print(table(rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
