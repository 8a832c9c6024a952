"""The one training loop: pretraining and every chapter use it.

A batch is what the model takes, with `labels`; `batches(step)` is a pure function of
the step, so a run is determined by its seed and can be continued from any step.
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.lab.checkpoint import (
    Progress,
    load_checkpoint,
    save_checkpoint,
    trainable,
)
from minipeft.lab.files import write_atomic
from minipeft.lab.progress import Bar, bar

Batch = Mapping[str, torch.Tensor]
Batches = Callable[[int], Batch]
IGNORE = -100
"""The label that the loss leaves out: torch's convention."""


def adamw(model: nn.Module, config: "TrainConfig") -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters; vectors and biases do not decay."""
    parameters = list(trainable(model).values())
    groups = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, foreach=True)


@dataclass(frozen=True)
class TrainConfig:
    """What a run does: linear warmup to `lr`, then a cosine down to `lr * floor`.

    `optimizer(model, config)` builds the optimizer; the schedule multiplies the
    learning rate of each of its groups. `validate_every=0`: only after the last step.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 0
    floor: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    validate_every: int = 0
    optimizer: Callable[[nn.Module, "TrainConfig"], torch.optim.Optimizer] = adamw

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; train for at least one step")
        if not self.lr > 0:
            raise InputError(f"the learning rate is {self.lr}; it must be positive")

    def factor(self, step: int) -> float:
        """Return the schedule's share of `lr` at a step that counts from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its last good state, and how often (in steps)."""

    path: Path
    every: int = 100
    resume: bool = False


@dataclass(frozen=True)
class History:
    """What a run did: the loss of each step, validation losses, wall-clock seconds."""

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the loss curve as JSON, atomically."""
        write_atomic(path, (json.dumps(vars(self)) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "History":
        """Read what `save` wrote.

        Raises:
            InputError: The file is absent or is not a loss curve.
        """
        try:
            fields = json.loads(path.read_text())
            fields["validation"] = [(int(s), float(v)) for s, v in fields["validation"]]
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a loss curve; train again") from error


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the step in hand was finished; the message says what was kept."""


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    validation: Sequence[Batch] = (),
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train the parameters that require gradients, and return what happened.

    Args:
        model: Called with a batch, returns an object with `.loss` (nats).
        batches: The batch of each step.
        config: Steps, learning rate and so on.
        validation: Batches whose loss is taken every `config.validate_every` steps.
        checkpoint: Where to keep the last good state; None: nowhere.

    Raises:
        Interrupted: Ctrl-C. The model is as the last complete step left it, and the
            checkpoint, if any, holds exactly that. A second Ctrl-C stops at once and
            leaves the checkpoint before it.
        InputError: The loss is no longer finite; nothing trains; the checkpoint does
            not fit or cannot be written.
    """
    if not trainable(model):
        raise InputError("no parameter requires gradients; inject an adapter first")
    run = _Run(model, config, validation, checkpoint)
    model.train()
    try:
        with ctrl_c() as stopped, bar(config.steps, run.step) as shown:
            while run.step < config.steps:
                run.advance(batches(run.step), shown)
                if stopped.is_set():
                    raise Interrupted(run.stop())
    finally:
        model.eval()
    run.keep()
    return History(run.losses, run.validation, run.seconds)


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        batches: Sequence[Batch],
        checkpoint: Checkpoint | None,
    ) -> None:
        self.model, self.config, self.checkpoint = model, config, checkpoint
        self.validation_batches = batches
        self.optimizer = config.optimizer(model, config)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        start = Progress(0)
        if checkpoint is not None and checkpoint.resume:
            start = load_checkpoint(checkpoint.path, model, self.optimizer)
        self.step, self.losses = start.step, list(start.losses)
        self.validation, self.seconds = list(start.validation), start.seconds

    def advance(self, batch: Batch, shown: Bar) -> None:
        """Take one step, then validate and save if it is time."""
        began = time.perf_counter()
        value = self.update(batch)
        self.step += 1
        self.losses.append(value)
        every = self.config.validate_every
        if self.step == self.config.steps or (every and self.step % every == 0):
            self.validate(shown)
        self.seconds += time.perf_counter() - began
        shown.advance(value)
        if self.checkpoint and self.step % self.checkpoint.every == 0:
            self.keep()

    def update(self, batch: Batch) -> float:
        """Descend along one batch's gradient; return its loss."""
        factor = self.config.factor(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = self.model(**on_device_of(self.model, batch)).loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"the loss became {value} at step {self.step + 1}; "
                f"lower the learning rate (it is {self.config.lr:g})"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(self.model).values(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def validate(self, shown: Bar) -> None:
        """Note the validation loss of this step."""
        if self.validation_batches:
            value = loss(self.model, self.validation_batches)
            self.validation.append((self.step, value))
            shown.validation = value

    def keep(self) -> None:
        """Save the state, where there is a place for it."""
        if self.checkpoint is not None:
            fields = (self.step, self.losses, self.validation, self.seconds)
            save_checkpoint(
                self.checkpoint.path, self.model, self.optimizer, Progress(*fields)
            )

    def stop(self) -> str:
        """Save, and say what was kept."""
        self.keep()
        done = f"stopped after step {self.step} of {self.config.steps}"
        if self.checkpoint is None:
            return f"{done}; no checkpoint was asked for"
        return f"{done}; continue from {self.checkpoint.path}"


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that the step in hand is finished."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals reach the main thread only
        return
    before = signal.getsignal(signal.SIGINT)

    def on_signal(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)  # the second one interrupts at once
        stopped.set()

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the mean loss in nats per predicted label, without gradients or dropout.

    Raises:
        InputError: There is no label to predict.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            labels = predicted(batch["labels"])
            total += float(model(**on_device_of(model, batch)).loss) * labels
            count += labels
    model.train(was_training)
    if count == 0:
        raise InputError("the batches hold no label; give at least one")
    return total / count


def on_device_of(model: nn.Module, batch: Batch) -> Batch:
    """Return the batch where the model's parameters live."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def predicted(labels: torch.Tensor) -> int:
    """Return how many labels count: a sequence's first token is never predicted."""
    kept = labels[:, 1:] if labels.ndim == 2 else labels
    return int((kept != IGNORE).sum())
