"""Paged optimizer states: larger than device memory, moved page by page."""

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.torch.adamw import BLOCKSIZE, AdamW, Job, State, init, update
from minipeft.values import check_integer, check_kind


@dataclass(frozen=True)
class Traffic:
    """How many pages were moved since the beginning, and why."""

    faults: int = 0  # pages for which a step had to wait
    prefetches: int = 0  # pages moved to the device before a step needed them
    evictions: int = 0
    write_backs: int = 0  # pages copied back because they had changed
    bytes_in: int = 0
    bytes_out: int = 0

    def __add__(self, more: "Traffic") -> "Traffic":
        return Traffic(*map(sum, zip(astuple(self), astuple(more), strict=True)))


@dataclass(frozen=True)
class Paging:
    """The size of a page, and how many pages the device may hold.

    Args:
        page_size: values in a page, a multiple of 256, so that no block is cut.
        budget: pages that fit on the device, at least 1. One page is in use; the
            others are filled in advance with the pages that come next.
    """

    page_size: int = 2**20
    budget: int = 4

    def __post_init__(self) -> None:
        check_integer("page_size", self.page_size)
        if self.page_size < 1 or self.page_size % BLOCKSIZE:
            raise InputError(
                f"page_size is {self.page_size}; choose a multiple of 256."
            )
        _check_budget(self.budget)


class Page:
    """A part of one parameter's state: stored on the host, copied to the device."""

    def __init__(self, state: State, part: slice, device: torch.device):
        self.part, self.device, self.dirty = part, device, False
        self.copy: State | None = None
        self.arrived: Any = None  # event: the copy to the device is complete
        self.written: Any = None  # event: the last step that changed it is complete
        self.left: Any = None  # event: the host has the newest values
        self.host = {
            name: value.view(-1)[_scaled(part, name)]
            for name, value in state.items()
            if isinstance(value, Tensor)
        }
        self.nbytes = sum(value.nbytes for value in self.host.values())


class Lanes:
    """The streams of a device: one copies in, one copies out, one computes.

    With one stream for both directions, a page coming in would wait for a page going
    out.
    """

    def __init__(self, device: torch.device):
        self.device, self.module = device, torch.get_device_module(device)
        self.inward = self.module.Stream(device)
        self.outward = self.module.Stream(device)

    @property
    def computing(self) -> Any:
        """The stream on which the caller computes at this moment."""
        return self.module.current_stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Run the following code on a stream."""
        context: AbstractContextManager[Any] = self.module.stream(stream)
        return context


class PageTable:
    """The pages on the device; the least recently used page is removed first.

    On a device with streams, pages move from and to pinned memory while the device
    computes. On other devices a page is moved by a plain copy.
    """

    def __init__(self, budget: int):
        self.budget, self.traffic = budget, Traffic()
        self.resident: OrderedDict[Page, None] = OrderedDict()
        self.lanes: dict[torch.device, Lanes] = {}

    def touch(self, page: Page) -> State:
        """Return a page on the device and make it the most recently used one."""
        if page not in self.resident:
            self._bring(page, Traffic(faults=1))
        self.resident.move_to_end(page)
        copy = cast(State, page.copy)
        if lanes := self._lanes(page.device):
            lanes.computing.wait_event(page.arrived)
            # The memory belongs to the stream that copies in. No other page may use
            # this memory until the computing stream has finished with it.
            _record(copy, lanes.computing)
        return copy

    def mark(self, page: Page) -> None:
        """Note that the step just queued changes a page, on the current stream."""
        page.dirty = True
        if lanes := self._lanes(page.device):
            page.written = lanes.computing.record_event()

    def prefetch(self, page: Page) -> None:
        """Move a page to the device before a step touches it, so that no step waits.

        The page counts as used now, even if it was already on the device. Otherwise the
        pages that come next would be the first to be removed.
        """
        if page not in self.resident:
            self._bring(page, Traffic(prefetches=1))
        self.resident.move_to_end(page)

    def evict(self, page: Page) -> None:
        """Remove a page from the device; if it changed, copy it to the host first."""
        if page not in self.resident:
            return
        self.traffic += Traffic(evictions=1)
        if page.dirty:
            self.write_back(page)
        page.copy = page.arrived = None
        del self.resident[page]

    def write_back(self, page: Page) -> None:
        """Copy a page to the host after all work queued on the device so far."""
        copy, lanes = cast(State, page.copy), self._lanes(page.device)
        if lanes is None:
            for name, home in page.host.items():
                home.copy_(copy[name])
        else:
            lanes.outward.wait_stream(lanes.computing)
            if page.written is not None:  # perhaps on a stream that is no more current
                lanes.outward.wait_event(page.written)
            with lanes.on(lanes.outward):
                for name, home in page.host.items():
                    home.copy_(copy[name], non_blocking=True)
            _record(copy, lanes.outward)
            page.left = lanes.outward.record_event()
        page.dirty = False
        self.traffic += Traffic(write_backs=1, bytes_out=page.nbytes)

    def resize(self, budget: int) -> None:
        """Change the budget; remove least recently used pages that no longer fit."""
        _check_budget(budget)
        self.budget = budget
        self._leave_room(budget)

    def synchronize(self) -> None:
        """Wait until every copy is complete."""
        for lanes in self.lanes.values():
            lanes.inward.synchronize()
            lanes.outward.synchronize()

    def _bring(self, page: Page, reason: Traffic) -> None:
        self._leave_room(self.budget - 1)
        lanes, host = self._lanes(page.device), page.host.items()
        if lanes is None:
            page.copy = {name: home.to(page.device, copy=True) for name, home in host}
        else:
            if page.left is not None:
                lanes.inward.wait_event(page.left)
            with lanes.on(lanes.inward):
                page.copy = {
                    name: home.to(page.device, copy=True, non_blocking=True)
                    for name, home in host
                }
            page.arrived = lanes.inward.record_event()
        self.resident[page] = None
        self.traffic += reason + Traffic(bytes_in=page.nbytes)

    def _leave_room(self, pages: int) -> None:
        while len(self.resident) > pages:
            self.evict(next(iter(self.resident)))

    def _lanes(self, device: torch.device) -> Lanes | None:
        if device.type == "cpu" or not hasattr(
            torch.get_device_module(device), "Event"
        ):
            return None
        if device not in self.lanes:
            self.lanes[device] = Lanes(device)
        return self.lanes[device]


class PagedAdamW(AdamW):
    """AdamW whose states are stored on the host; its results have the bits of `AdamW`.

    A step that has to be computed twice reads the states from the host once more.

    Args:
        params: as for `AdamW`.
        lr: the learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, relative to lr.
        bits: of the states, 32 or 8.
        paging: the size of a page, and how many the device may hold.

    Attributes:
        table: the pages on the device and the count of moved pages; `table.resize`
            makes room when other tensors need memory.

    Raises:
        InputError: as `AdamW` does; then nothing was changed.

    Source: QLoRA (arXiv:2305.14314), section 3, "Paged Optimizers".
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bits: int = 32,
        paging: Paging | None = None,
    ):
        check_kind("paging", paging, Paging, type(None))
        self.paging = paging or Paging()
        self.pages: dict[Tensor, list[Page]] = {}
        super().__init__(params, lr, betas, eps, weight_decay, bits)

    def __getstate__(self) -> dict[str, Any]:
        """Put the newest states and the paging into a copy or a pickle."""
        self.settle()
        paging = replace(self.paging, budget=self.table.budget)
        return {**super().__getstate__(), "paging": paging}

    def advance(self, work: list[Job]) -> None:
        """Take a step page by page; the next pages are copied while one is in use."""
        queue = [
            (page, job)
            for job in work
            for page in self._pages(job.p, job.group["bits"])
        ]
        for i, (page, (p, group, _)) in enumerate(queue):
            state = self.table.touch(page)
            for following, _ in queue[i + 1 : i + self.table.budget]:
                self.table.prefetch(following)
            state["step"] = self.state[p]["step"]
            update(p, cast(Tensor, p.grad), state, group, page.part)
            self.table.mark(page)
        for p, *_ in work:
            self.state[p]["step"] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state from the host, after writing changed pages back."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bit for bit; all pages start on the host."""
        self.paging = replace(self.paging, budget=self.table.budget)
        super().load_state_dict(state_dict)

    def settle(self) -> None:
        """Write changed pages back and wait until the host has them."""
        for page in self.table.resident:
            if page.dirty:
                self.table.write_back(page)
        self.table.synchronize()

    def home(self, p: Tensor) -> torch.device:
        """Return the device that stores the state of a parameter: the host."""
        return torch.device("cpu")

    def placed(self, value: Tensor, p: Tensor) -> Tensor:
        """Return a copy of a saved state, on the host."""
        copy = value.detach().to("cpu", copy=True)
        return copy.pin_memory() if p.is_cuda else copy

    def _survey(self) -> None:
        # States that were loaded or copied have no page on the device yet.
        self.table, self.pages = PageTable(self.paging.budget), {}
        super()._survey()

    def _pages(self, p: Tensor, bits: int) -> list[Page]:
        if not self.state[p]:
            fresh = init(torch.empty_like(p, device="cpu"), bits)
            tensors = {k: v for k, v in fresh.items() if isinstance(v, Tensor)}
            placed = {k: self.placed(v, p) for k, v in tensors.items()}
            self.state[p] = {**fresh, **placed}
        pages = self.pages.get(p)
        if pages is None or any(page.device != p.device for page in pages):
            for page in pages or ():  # the parameter moved to another device
                self.table.evict(page)
            if pages:  # the new pages read on the host what these still write there
                self.table.synchronize()
            size = self.paging.page_size
            starts = range(0, p.numel(), size)
            cuts = [slice(start, min(start + size, p.numel())) for start in starts]
            pages = [Page(self.state[p], part, p.device) for part in cuts]
            self.pages[p] = pages
        return pages


def _record(copy: State, stream: Any) -> None:
    for values in copy.values():
        if isinstance(values, Tensor):
            values.record_stream(stream)


def _scaled(part: slice, name: str) -> slice:
    unit = BLOCKSIZE if name.endswith("absmax") else 1
    return slice(part.start // unit, -(-part.stop // unit))


def _check_budget(budget: int) -> None:
    check_integer("budget", budget, 1)
