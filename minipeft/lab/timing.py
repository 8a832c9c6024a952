"""Time two implementations in turns, so that a slow minute slows both."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from minipeft.errors import InputError

SLEEP = 2_000_000  # cycles of the device, about a millisecond
Turn = Callable[[], object]
Clock = Callable[[Turn], float]
"""Returns the seconds of a turn."""


@dataclass(frozen=True)
class Pair:
    """Two implementations: ours, theirs, and the ratio to reach."""

    name: str
    against: str
    ours: Turn
    theirs: Turn
    target: float
    note: str = ""


@dataclass(frozen=True)
class Timing:
    """The measured milliseconds, and the ratio ours / theirs."""

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


def wall(run: Turn) -> float:
    """Return the seconds that pass while something runs on the CPU."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def processor(run: Turn) -> float:
    """Return the processor seconds of this process; other processes do not count."""
    began = time.process_time()
    run()
    return time.process_time() - began


def events(run: Turn, device: str = "cuda") -> float:
    """Return the seconds between two events on the current stream of a CUDA device.

    A launch returns at once, so a clock of the host would time only the launch. The
    device sleeps first, until the host has launched what is timed.
    """
    with torch.cuda.device(device):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]
        start.record()
        run()
        stop.record()
        stop.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return milliseconds / 1e3


def cost(device: str, run: Callable[..., object], *arguments: object) -> float:
    """Return the seconds that a call costs its device: `cpu`, `cuda` or `cuda:N`."""
    on_cuda = device.startswith("cuda")
    clock = partial(events, device=device) if on_cuda else processor
    return clock(lambda: run(*arguments))


def measure(pair: Pair, rounds: int, clock: Clock = wall) -> Timing:
    """Time a pair's turns, alternating and exchanging who goes first."""
    seconds: dict[Turn, list[float]] = {pair.ours: [], pair.theirs: []}
    for turn in seconds:
        turn()
    for i in range(rounds):
        order = [*seconds] if i % 2 else [*reversed(seconds)]
        for turn in order:
            seconds[turn].append(clock(turn))
    ours, theirs = seconds.values()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Timing(
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
    """Refuse to time two implementations with different results.

    Raises:
        InputError: the relative distance is above its bound.
    """
    if not distance <= bound:
        raise InputError(
            f"{what}: the two results differ by {distance:.2e} of their size, allowed "
            f"are {bound:.2e}; timing them would compare different things"
        )


def table(rows: list[Timing]) -> str:
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
