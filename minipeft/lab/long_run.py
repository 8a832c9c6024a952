"""A long run of several methods along their rates: gain against forgetting."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minipeft.lab import results, spectra
from minipeft.lab.chapter import Chapter

Run = dict[str, Any]
FIRST = 10
"""Left singular vectors of a matrix that are examined."""
LOSSES = ("gain", "forgotten")
DIGITS = {"gain": 3, "forgotten": 3, "rank": 1, "size": 3, "intruders": 2}
"""The quantities of a table, and their digits."""
HEAD = ["rate", "gain, nats", "loss of the novel", "rank for 90 %"]
HEAD += ["‖ΔW‖/‖W₀‖", "intruders of 10"]


def intruded(run: Run, threshold: float) -> float:
    """Return the intruder dimensions among the first of a matrix, on average.

    Args:
        run: of one seed; `similar` holds the largest cosine of each vector.
        threshold: below which a vector is an intruder.
    """
    similar = torch.tensor(run["similar"])
    return FIRST * spectra.intruders(similar, threshold) / len(similar)


class LongRun:
    """The results of a long run: each method, along its rates, with every seed.

    Args:
        chapter: from `start`.
        path: of the committed file.
        label: of the model, in the name of a best rate.

    Attributes:
        full: what the file holds.
        sweeps: of each method, the runs of every seed by rate.
        rates: the best of each method.
    """

    def __init__(self, chapter: Chapter, path: Path, label: str = "") -> None:
        self.chapter, self.full = chapter, chapter.read_full(path)
        self.methods: list[str] = list(self.full["methods"])
        self.seeds: list[int] = self.full["seeds"]
        self.names = {n: n if "full" in n else f"LoRA, {n}" for n in self.methods}
        self.sweeps: dict[str, dict[float, list[Run]]] = {
            n: dict(self.full["methods"][n]["sweep"]) for n in self.methods
        }
        self.rates = {n: self.best(n, label) for n in self.methods}

    def best(self, name: str, label: str) -> float:
        """Return the rate with the lowest loss on the definitions for tuning."""
        tuned = {r: self.mean(name, r, "tuning") for r in self.sweeps[name]}
        setting = f"{label}{self.names[name]}, {self.full['steps']} steps"
        return self.chapter.best(setting, tuned)

    def values(self, name: str, rate: float, what: str) -> list[float]:
        """Return a quantity of each seed."""
        before, runs = self.full["before"], self.sweeps[name][rate]
        if what == "gain":
            return [before["definitions"] - run["definitions"] for run in runs]
        if what == "forgotten":
            return [run["novel"] - before["novel"] for run in runs]
        if what == "intruders":
            return [intruded(run, 0.5) for run in runs]
        return [run[what] for run in runs]

    def mean(self, name: str, rate: float, what: str) -> float:
        """Return the mean of a quantity over the seeds."""
        return statistics.mean(self.values(name, rate, what))

    def at(self, name: str, what: str) -> list[float]:
        """Return a quantity of each seed at the method's best rate."""
        return self.values(name, self.rates[name], what)

    def row(self, name: str) -> list[str]:
        """Return a line of a table: the method at its best rate."""
        cells = [results.spread(self.at(name, w), d) for w, d in DIGITS.items()]
        return [self.names[name], f"{self.rates[name]:g}", *cells]

    def line(self, name: str, seed: int) -> Any:
        """Return gain and forgetting of a seed by rate, while the gain still rises."""
        points = [(0.0, 0.0)]
        for rate in self.sweeps[name]:
            gain, lost = (self.values(name, rate, w)[seed] for w in LOSSES)
            if gain <= points[-1][0]:
                break
            points.append((gain, lost))
        return np.array(points).T

    def beside(self, name: str, rate: float) -> tuple[list[float], Any, list[float]]:
        """Return forgetting, full fine-tuning's with as much gain, and the difference.

        The first method of the run is full fine-tuning.
        """
        gains, losses = (self.values(name, rate, w) for w in LOSSES)
        lines = [self.line(self.methods[0], seed) for seed in range(len(gains))]
        there = [np.interp(g, *line) for g, line in zip(gains, lines, strict=True)]
        return losses, there, [a - b for a, b in zip(losses, there, strict=True)]

    def table(self, name: str) -> str:
        """Return every method at its best rate, and full fine-tuning with as much gain.

        Args:
            name: of the model, the head of the first column.
        """
        head = "loss of the novel, full fine-tuning at that gain"
        whole, *others = self.methods
        rows = [[name, *HEAD, head], [*self.row(whole), ""]]
        for n in others:
            there = self.beside(n, self.rates[n])[1]
            rows.append([*self.row(n), results.spread(there)])
        return results.table(rows)
