"""Train a model on one task from several starts, and draw the losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from minipeft.lab import plots
from minipeft.lab.checkpoint import trainable
from minipeft.lab.task import Task
from minipeft.lab.train import (
    Batch,
    Batches,
    Checkpoint,
    History,
    TrainConfig,
    loss,
    train,
)
from minipeft.values import checked

FARTHEST = 4
"""The most half decades that a sweep of rates moves from its start."""


def nowhere() -> Checkpoint | None:
    """Keep no checkpoint."""
    return None


@dataclass(frozen=True)
class Lesson:
    """The training data: the pairs of the training split, and both splits in batches.

    `kept` returns the checkpoint of the next run.
    """

    pairs: list[tuple[str, str]]
    batches: Batches
    held_out: list[Batch]
    kept: Callable[[], Checkpoint | None] = nowhere


@dataclass(frozen=True)
class Run:
    """A tuned model, the count of trained numbers, and its losses (nats)."""

    model: nn.Module
    trained: int
    before: float
    history: History

    @property
    def after(self) -> float:
        """The validation loss at the end."""
        return self.history.validation[-1][1]


@checked
def lesson(
    task: Task,
    tokenizer: Any,
    rows: int = 6,
    kept: Callable[[], Checkpoint | None] = nowhere,
) -> Lesson:
    """Return a task for a tokenizer.

    Args:
        task: the examples.
        tokenizer: of the model that will learn.
        rows: examples in a batch.
        kept: returns the checkpoint of a run.
    """
    batches, held_out = task.training(tokenizer, rows), task.held_out(tokenizer)
    return Lesson(task.train, batches, held_out, kept)


@checked
def tune(
    model: nn.Module, learn: Lesson, steps: int, lr: float, checks: int = 5
) -> Run:
    """Train what requires gradients: a tenth of the steps warms up, a cosine follows.

    Args:
        model: as in `train.train`; it is changed.
        learn: the task.
        steps: of training.
        lr: the largest learning rate.
        checks: how often the validation loss is taken, the last step included.

    Raises:
        InputError: as `train.train` does.
    """
    before = loss(model, learn.held_out)
    config = TrainConfig(
        steps, lr, warmup=steps // 10, validate_every=max(1, steps // checks)
    )
    history = train(model, learn.batches, config, learn.held_out, learn.kept())
    count = sum(parameter.numel() for parameter in trainable(model).values())
    return Run(model, count, before, history)


@checked
def sweep(
    make: Callable[[], nn.Module],
    learn: Lesson,
    steps: int,
    start: int,
    checks: int = 5,
) -> dict[float, Run]:
    """Tune at rates of half a decade each until the best has worse ones on both sides.

    Args:
        make: returns a fresh model.
        learn: the task.
        steps: of training.
        start: k of the first rate, 10^(k/2); its two neighbours follow.
        checks: as in `tune`.

    Returns:
        The runs by rate, the rates rising; at most `FARTHEST` steps from the start.
    """
    runs: dict[int, Run] = {}
    best = start
    while missing := {best - 1, best, best + 1} - runs.keys():
        for k in sorted(missing):
            torch.manual_seed(0)
            runs[k] = tune(make(), learn, steps, _rate(k), checks)
        best = min(runs, key=lambda k: runs[k].after)
        if abs(best - start) >= FARTHEST:
            break
    return {_rate(k): runs[k] for k in sorted(runs)}


def _rate(k: int) -> float:
    """10^(k/2) to one digit: 0.1, 0.3, 1, 3."""
    return float(f"{10 ** (k / 2):.0e}")


def curves(runs: Mapping[str, Run], without: float, label: str) -> Figure:
    """Draw the validation loss of each run from its first step.

    Args:
        runs: by name, in the order of the legend.
        without: the loss of the base, drawn as a dashed line.
        label: of that line.
    """
    figure, ax = plots.axes(
        x="step", y="validation loss (nats per token)", size=(6.4, 3.3)
    )
    for color, (name, run) in zip(plots.PALETTE, runs.items(), strict=False):
        steps, values = zip((0, run.before), *run.history.validation, strict=True)
        ax.plot(steps, values, "o-", color=color, label=name, markersize=4)
    ax.axhline(without, color=plots.INK, linestyle="--", linewidth=1)
    last = max(run.history.validation[-1][0] for run in runs.values())
    ax.text(last, without, label, ha="right", va="bottom", color=plots.INK)
    ax.legend()
    return figure
