"""The one training loop: pretraining and every chapter use it.

A batch holds the model's arguments, with `labels`. `batches(index)` depends only on its
index, so the seed determines a run, and a run can be continued from any step.
"""

import contextlib
import hashlib
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.interop.tensors import bytes_of
from minipeft.lab.checkpoint import (
    Progress,
    check_unused,
    load_checkpoint,
    save_checkpoint,
    trainable,
)
from minipeft.lab.diagnosis import (
    bad_gradient,
    bad_loss,
    check_batch,
    check_ids,
    check_reached,
    check_trains,
    checked_labels,
    grown,
    no_gradient,
    predicted,
    start_of,
)
from minipeft.lab.files import claimed, write_atomic
from minipeft.lab.generators import undrawn
from minipeft.lab.identity import Identity
from minipeft.lab.memory.measured import StepMemory, step_memory
from minipeft.lab.memory_peak import unwatched
from minipeft.lab.progress import Bar, bar
from minipeft.values import (
    check_calls,
    check_flag,
    check_integer,
    check_kind,
    check_number,
    checked,
)

FIRST = "the data, by SHA-256 of the first batch,"
Batch = Mapping[str, torch.Tensor]
Batches = Callable[[int], Batch]


@checked
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

    A step averages the gradient over `accumulate` batches, each label counting once,
    so that it is the step of one larger batch. `optimizer(model, config)` builds the
    optimizer; the schedule multiplies the learning rate of each of its groups.
    `validate_every=0`: only after the last step.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 0
    floor: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    validate_every: int = 0
    accumulate: int = 1
    optimizer: Callable[[nn.Module, "TrainConfig"], torch.optim.Optimizer] = adamw

    def __post_init__(self) -> None:
        for name in ("warmup", "validate_every", "accumulate"):
            check_integer(name, getattr(self, name), least=int(name == "accumulate"))
        for name in ("lr", "floor", "weight_decay"):
            check_number(name, getattr(self, name))
        check_integer("steps", self.steps)
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; train for at least one step")
        if not 0 < self.lr < math.inf:
            raise InputError(f"the learning rate is {self.lr}; it must be positive")
        if not _are_decays(self.betas):
            raise InputError(f"betas are {self.betas!r}; choose both in [0, 1)")
        if not self.clip > 0:
            raise InputError(f"clip is {self.clip}; give a positive norm, or math.inf")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if not (0 <= self.floor <= 1 and self.warmup >= 0 and self.weight_decay >= 0):
            raise InputError(
                f"floor is {self.floor}, warmup {self.warmup}, weight decay "
                f"{self.weight_decay}; floor lies in [0, 1], the others at or above 0"
            )
        if self.lr * self.weight_decay > 1:
            raise InputError(
                f"weight decay {self.weight_decay:g} times the learning rate "
                f"{self.lr:g} is above 1, so a step would turn the sign of every "
                "weight; lower one of them"
            )

    def factor(self, step: int) -> float:
        """Return the schedule's share of `lr` at a step that counts from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


def _are_decays(betas: object) -> bool:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        return False
    return all(isinstance(b, int | float) and 0 <= b < 1 for b in betas)


@dataclass(frozen=True)
class Checkpoint:
    """The file for the last good state of a run, and the steps between two writes.

    A run that resumes starts from the file; any other refuses one that is there. A
    passing one does not outlive the program, so no message offers to go on from it.
    """

    path: Path
    every: int = 100
    resume: bool = False
    passing: bool = False

    def __post_init__(self) -> None:
        check_kind("path", self.path, str, os.PathLike)
        check_integer("every", self.every, 1)
        check_flag("resume", self.resume)
        check_flag("passing", self.passing)


@dataclass(frozen=True)
class History:
    """What a run did: the loss of each step, validation losses, wall-clock seconds.

    `peak` is that of its second step; None: the step was not watched.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    peak: StepMemory | None = None

    def save(self, path: Path) -> None:
        """Write the loss curve as JSON, atomically."""
        write_atomic(path, (json.dumps(vars(self)) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "History":
        """Read the file that `save` wrote.

        Raises:
            InputError: The file is absent or is not a loss curve.
        """
        try:
            fields = json.loads(path.read_text())
            fields["validation"] = [(int(s), float(v)) for s, v in fields["validation"]]
            peak = fields.get("peak")
            fields["peak"] = peak and StepMemory(*peak)
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a loss curve; train again") from error


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM, after the current step; the message says what was kept.

    Python ends a program that does not catch it with a traceback and exit code 1, as
    for every exception of a class of one's own. The chapters end with `code`, and so
    can another program: `except Interrupted as stopped: sys.exit(stopped.code)`.

    Attributes:
        signal: its number.
        kept: whether a checkpoint holds the state.
    """

    signal: int = signal.SIGINT
    kept: bool | None = None

    @property
    def code(self) -> int:
        """The exit code by which shells and batch systems know a signal: 128 + it."""
        return 128 + self.signal


ANEW = "go on from it with resume=True, choose another path, or remove the file"


class GrowthWarning(UserWarning):
    """Trained weights grew beyond what training does, and the loss is finite."""


class ResumeWarning(UserWarning):
    """A run continues with other settings than at its start."""


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
        batches: The batch of each index; a step takes `config.accumulate` of them.
        config: Steps, learning rate and so on.
        validation: Batches whose loss is taken every `config.validate_every` steps.
        checkpoint: Where to keep the last good state; None: nowhere.

    Raises:
        Interrupted: Ctrl-C or SIGTERM. The model is as the last complete step left it,
            and the checkpoint, if any, holds exactly that. A second signal stops at
            once and leaves the checkpoint before it.
        InputError: The loss or a gradient is no longer finite; a batch has no label, or
            an id that is none of the model's; nothing trains, or a layer is merged; the
            checkpoint does not fit, cannot be written, is another process's, or is
            there though the run does not resume.
    """
    check_kind("model", model, nn.Module)
    check_calls("batches", batches)
    check_kind("config", config, TrainConfig)
    check_kind("checkpoint", checkpoint, Checkpoint, type(None))
    check_trains(model)
    claim = claimed(checkpoint.path) if checkpoint else contextlib.nullcontext()
    with claim:
        if checkpoint and not checkpoint.resume:
            check_unused(Path(checkpoint.path), ANEW)
        run = _Run(model, batches, config, validation, checkpoint)
        model.train()
        try:
            with signals() as caught, bar(config.steps, run.step) as shown:
                while run.step < config.steps:
                    run.advance(shown)
                    if caught:
                        raise run.stopped(caught[0])
        finally:
            model.eval()
        run.keep()
    return History(run.losses, run.validation, run.seconds, run.peak)


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        config: TrainConfig,
        validation: Sequence[Batch],
        checkpoint: Checkpoint | None,
    ) -> None:
        self.model, self.config, self.checkpoint = model, config, checkpoint
        self.batches, self.validation_batches = batches, validation
        self.optimizer = config.optimizer(model, config)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.identity = Identity(model) if checkpoint else None
        self.settings: dict[str, str] = {}
        start = Progress(0)
        self.resumed = checkpoint is not None and checkpoint.resume
        if checkpoint is not None and checkpoint.resume:
            path = checkpoint.path
            start = load_checkpoint(
                path, model, self.optimizer, self.identity, config.steps
            )
            self.settings = start.settings
        self.step, self.losses, self.fresh = start.step, list(start.losses), 0
        self.validation, self.seconds = list(start.validation), start.seconds
        self.peak: StepMemory | None = None
        self.start, self.warned = start_of(model, self.step, config.lr), False

    def advance(self, shown: Bar) -> None:
        """Take one step, then validate and save if it is time."""
        began = time.perf_counter()
        self.fresh += 1
        watch = self.fresh == 2 and unwatched()  # the first makes the states
        value = self.measured(shown) if watch else self.update()
        self.step += 1
        self.losses.append(value)
        every = self.config.validate_every
        if self.step == self.config.steps or (every and self.step % every == 0):
            self.validate(shown)
            self.note_growth()
        self.seconds += time.perf_counter() - began
        shown.advance(value)
        if self.checkpoint and self.step % self.checkpoint.every == 0:
            self.keep()

    def measured(self, shown: Bar) -> float:
        """Take a step, and say what peak of memory was predicted, and what was met."""
        count = self.config.accumulate
        with undrawn(self.model):
            batches = [self.batches(self.step * count + i) for i in range(count)]
        batch = max(batches, key=lambda one: one["labels"].numel())
        with step_memory(self.model, self.optimizer, batch, count) as found:
            value = self.update()
        self.peak = found[0]
        shown.note(str(self.peak))
        return value

    def update(self) -> float:
        """Descend along the gradient of one step's batches; return their loss."""
        first = self.step * self.config.accumulate
        batches = [self.batches(first + i) for i in range(self.config.accumulate)]
        for batch in batches:
            check_batch(batch, self.step)
            check_ids(self.model, batch, f"the batch of step {self.step + 1}")
        self.note_settings(batches[0])
        self.set_rates()
        try:
            value = self.add_gradients(batches)
            if self.fresh == 1:
                check_reached(self.model, lambda: self.add_gradients(batches))
            self.check_gradients()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return value

    def add_gradients(self, batches: Sequence[Batch]) -> float:
        """Add up the batches' gradients, each label counting once; return the loss."""
        labels = [checked_labels(batch, self.step) for batch in batches]
        value = 0.0
        for batch, count in zip(batches, labels, strict=True):
            loss = self.model(**on_device_of(self.model, batch)).loss
            if len(batches) > 1:
                loss = loss * (count / sum(labels))
            value += float(loss.detach())
            if not math.isfinite(value):
                cause = bad_loss(self.model, value, self.step, self.start)
                raise InputError(f"{cause} {self.at}")
            if not loss.requires_grad:
                raise InputError(
                    no_gradient(self.model, on_device_of(self.model, batch))
                )
            loss.backward()
        return value

    def check_gradients(self) -> None:
        """Clip the gradient; before a weight changes, refuse one that is not finite."""
        parameters = trainable(self.model).values()
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.clip))
        if not math.isfinite(norm):
            raise InputError(f"{bad_gradient(self.model, norm, self.start)} {self.at}")

    @property
    def at(self) -> str:
        """The position of the run, for error messages."""
        return f"(step {self.step + 1}; the parameters are those of step {self.step})"

    def set_rates(self) -> None:
        """Set each group's learning rate to its share of this step."""
        factor = self.config.factor(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
            if not math.isfinite(
                float(torch.tensor(rate / (1 - self.config.betas[0])))
            ):
                raise InputError(
                    f"the learning rate {rate:g} is beyond what float32 can step by; "
                    "lower the learning rate"
                )
            if rate and not float(torch.tensor(rate * factor)):
                raise InputError(
                    f"the learning rate {rate:g} times the schedule's {factor:g} is 0 "
                    "in float32, so nothing would train; raise the learning rate"
                )

    def note_settings(self, batch: Batch) -> None:
        """Store the settings; warn once if a resumed run has changed them."""
        if self.settings and not self.resumed:
            return
        now = {
            "the batch size": str(len(batch["labels"])),
            "accumulate": str(self.config.accumulate),
            "the learning rate": f"{self.config.lr:g}",
        }
        now |= self.first(batch)
        if self.settings.get("the batch size", "") != now["the batch size"]:
            self.settings.pop(FIRST, None)  # examples of another batch size differ
        changes = [
            f"{name} was {self.settings[name]} and is {value}"
            for name, value in now.items()
            if self.settings.get(name, value) != value
        ]
        if changes:
            text = (
                f"the run goes on with other settings: {', '.join(changes)}; stop it "
                "and give the former ones if that was not meant"
            )
            warnings.warn(text, ResumeWarning, stacklevel=2)
        self.settings, self.resumed = now, False

    def first(self, batch: Batch) -> dict[str, str]:
        """Return what the data are told by; nothing where a resumed run draws them."""
        if self.step:
            with undrawn(self.model) as moved:
                batch = self.batches(0)
                if moved():  # the start had other draws
                    return {}
        return {FIRST: _digest(batch)}

    def validate(self, shown: Bar) -> None:
        """Record the validation loss of this step."""
        if self.validation_batches:
            value = loss(self.model, self.validation_batches)
            self.validation.append((self.step, value))
            shown.validation = value

    def note_growth(self) -> None:
        """Warn once if the weights grew beyond what training does."""
        if not self.warned and (how := grown(self.model, self.start)):
            self.warned = True
            warnings.warn(f"by step {self.step} {how}", GrowthWarning, stacklevel=2)

    def keep(self) -> None:
        """Save the state if the run has a checkpoint."""
        if self.checkpoint is not None:
            progress = Progress(
                self.step, self.losses, self.validation, self.seconds, self.settings
            )
            place, optimizer = self.checkpoint.path, self.optimizer
            save_checkpoint(place, self.model, optimizer, progress, self.identity)

    def stopped(self, number: int) -> Interrupted:
        """Save the state, and return the message about it."""
        self.keep()
        done = f"stopped after step {self.step} of {self.config.steps}"
        where, kept = "no checkpoint was asked for", self.checkpoint is not None
        if self.checkpoint is not None:
            where = f"continue from {self.checkpoint.path}"
            if self.checkpoint.passing:
                where, kept = "the state of this run is not kept", False
        interrupted = Interrupted(f"{done}; {where}")
        interrupted.signal, interrupted.kept = number, kept
        return interrupted


def _digest(batch: Batch) -> str:
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(f"{name} {[*batch[name].shape]}".encode())
        if batch[name].layout == torch.strided:  # a sparse one has no bytes in order
            digest.update(bytes_of(batch[name].detach().cpu()))
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Record the first Ctrl-C or SIGTERM; the run ends after the current step."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread gets signals
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: Any) -> None:
        restore()  # a second signal interrupts at once
        caught.append(number)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield caught
    finally:
        restore()


@checked
def loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the mean loss in nats per predicted label, without gradients or dropout.

    Raises:
        InputError: There is no label to predict; an id is none of the model's.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            check_ids(model, batch, f"batch {number}")
            labels = predicted(batch["labels"])
            total += float(model(**on_device_of(model, batch)).loss) * labels
            count += labels
    model.train(was_training)
    if count == 0:
        raise InputError("the batches hold no label; give at least one")
    return total / count


@checked
def on_device_of(model: nn.Module, batch: Batch) -> Batch:
    """Return the batch on the device of the model's parameters."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
