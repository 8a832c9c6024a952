"""One batch that is longer than the others, on a card that has no room for all."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from minipeft.lab.card import Card, clear, demand, on_device
from minipeft.lab.memory_peak import held
from minipeft.lab.train import Batch, Batches, on_device_of
from minipeft.torch.inject import adapter_state_dict, trainable_parameters
from minipeft.torch.paged import PagedAdamW, Traffic

Ready = Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
"""What makes a model, and its optimizer with states."""
GRAIN = 16 * 2**20
"""Bytes between the sizes of a card at the end of a search."""


@dataclass(frozen=True)
class Course:
    """The batches of a run.

    Attributes:
        usual: by the number of the step.
        long: the one that is longer.
        at: its step.
        steps: of the run.
    """

    usual: Batches
    long: Batch
    at: int
    steps: int

    def batch(self, k: int) -> Batch:
        """Return the batch of a step."""
        return self.long if k == self.at else self.usual(k)


class StepLog(NamedTuple):
    """A step: its loss, bytes of states during the pass, and the most bytes in use."""

    loss: float
    states: int
    peak: int


class Budget(NamedTuple):
    """Bytes that decide who has room.

    Attributes:
        fixed: of weights and adapters.
        states: of the optimizer.
        least: of a card on which the run with pages just ends; on a CPU that card needs
            one page more.
        whole: of a card on which the run without pages just ends; it may need more.
    """

    fixed: int
    states: int
    least: int
    whole: int

    @property
    def size(self) -> float:
        """Of a card half way between both: it has room for half of what pages save."""
        return (self.least + self.whole) / 2


@dataclass
class Attempt:
    """How far a run came.

    Attributes:
        log: of the steps that it finished.
        adapters: at its end, on the host.
        traffic: of pages; None: without pages.
        error: what ended it; empty: nothing.
    """

    log: list[StepLog]
    adapters: dict[str, Tensor]
    traffic: Traffic | None
    error: str


def ready(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the states of an optimizer without weight decay; no weight changes."""
    for parameter in trainable_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def resize(optimizer: torch.optim.Optimizer, pages: int) -> None:
    """Let so many pages stay on the device, where states are paged."""
    if isinstance(optimizer, PagedAdamW):
        optimizer.table.resize(pages)


def attempt(make: Ready, course: Course, card: Card) -> Attempt:
    """Train on a card to the end, or as far as it has room; nothing stays on it.

    Args:
        make: called before the card has its size.
        course: of the run.
        card: not entered.
    """
    clear(card.device)  # else the model would lie between what an earlier one left
    model, optimizer = make()
    log, error = _run(model, optimizer, course, card)
    adapters = {k: v.cpu() for k, v in adapter_state_dict(model).items()}
    paged = isinstance(optimizer, PagedAdamW)
    traffic = cast(PagedAdamW, optimizer).table.traffic if paged else None
    return Attempt(log, adapters, traffic, error)


def budget(whole: Ready, paged: Ready, course: Course, device: str) -> Budget:
    """Measure what decides who has room, where what is in use counts: not on CUDA.

    Args:
        whole: with states that stay on the device.
        paged: with pages.
        course: of the run.
        device: `cpu`.
    """
    model, optimizer = whole()
    fixed = held(model)
    states = on_device(model, optimizer) - fixed
    del model, optimizer
    model, optimizer = paged()
    resize(optimizer, 1)
    paging = demand(model, dict(on_device_of(model, course.long)), device)
    return Budget(fixed, states, paging, paging + states)


def narrow(
    make: Ready, card: Card, course: Course, between: tuple[int, int], until: float
) -> str:
    """Look for the smallest card on which a run just ends, on three steps.

    Args:
        make: of the run.
        card: gives the device.
        course: of the run.
        between: bytes that are too few, and bytes that are tried first.
        until: when the search stops, by `time.monotonic`.

    Returns:
        between which sizes it lies, in words.
    """
    clear(card.device)
    model, optimizer = make()
    short = replace(course, at=1, steps=3)

    def enough(size: int) -> bool:
        return not _run(model, optimizer, short, Card(size, card.device))[1]

    low, high = between
    if not enough(high):
        return f"more than {high / 1e6:,.0f} MB"
    while high - low > GRAIN and time.monotonic() < until:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return f"more than {low / 1e6:,.0f} MB and at most {high / 1e6:,.0f}"


def smallest(enough: Callable[[int], bool], start: int, grain: int) -> int:
    """Return the smallest multiple of `grain` that is enough.

    Args:
        enough: tells of a number; of all above it too.
        start: a number to begin with.
        grain: of what is tried.
    """
    low, high = 0, -(-start // grain)
    while not enough(high * grain):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle * grain) else (middle, high)
    return high * grain


def _run(
    model: nn.Module, optimizer: torch.optim.Optimizer, course: Course, card: Card
) -> tuple[list[StepLog], str]:
    """Return the steps that ended, and what the card said if one did not."""
    log: list[StepLog] = []
    error = ""
    try:
        with card:
            for k in range(course.steps):
                log.append(_step(model, optimizer, card, course, k))
    except torch.OutOfMemoryError as found:
        error = ". ".join(str(found).split(". ")[:2])  # torch goes on with advice
    optimizer.zero_grad()
    return log, error


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    card: Card,
    course: Course,
    k: int,
) -> StepLog:
    batch = on_device_of(model, course.batch(k))
    pages = optimizer.paging.budget if isinstance(optimizer, PagedAdamW) else 0
    if k == course.at:
        resize(optimizer, 1)
    kept = on_device(model, optimizer)
    with card.takes(kept) as passing:
        loss = model(**batch).loss
        loss.backward()
    nn.utils.clip_grad_norm_(trainable_parameters(model), 1.0)
    resize(optimizer, pages)
    with card.takes(on_device(model, optimizer)) as stepping:
        optimizer.step()
        optimizer.zero_grad()
    return StepLog(loss.item(), kept - held(model), max(*passing, *stepping))
