"""Paged optimizer states: larger than device memory, moved page by page."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import prod

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import adamw
from minipeft.reference.adamw import AdamW, State, Weight
from minipeft.reference.blockwise import Blockwise
from minipeft.values import check_integer, check_kind


@dataclass(frozen=True)
class Traffic:
    """How many pages were moved since `init`, and why."""

    faults: int = 0  # pages for which a step had to wait
    prefetches: int = 0  # pages moved before a step needed them
    evictions: int = 0
    write_backs: int = 0  # evictions of a page that had changed
    bytes_in: int = 0
    bytes_out: int = 0

    def __add__(self, more: "Traffic") -> "Traffic":
        pairs = zip(astuple(self), astuple(more), strict=True)
        return Traffic(*(mine + theirs for mine, theirs in pairs))


@dataclass(frozen=True)
class Paged:
    """Optimizer states cut into pages, of which at most `budget` are on the device."""

    host: tuple[State, ...]  # all pages; their numbers run over all tensors
    device: Mapping[int, State]  # least recently used first; changed if not the host's
    budget: int
    page_size: int
    pages: tuple[range, ...]  # of each tensor
    shapes: tuple[tuple[int, ...], ...]  # of each tensor
    traffic: Traffic = Traffic()

    def __post_init__(self) -> None:
        """Refuse what no table is made of."""
        for name in ("host", "pages", "shapes"):
            check_kind(name, getattr(self, name), tuple)
        check_kind("device", self.device, Mapping)
        check_kind("traffic", self.traffic, Traffic)
        check_integer("budget", self.budget, 1)
        check_integer("page_size", self.page_size, 1)


def init(states: Sequence[State], page_size: int, budget: int) -> Paged:
    """Cut the states of some tensors into pages, all of them on the host.

    Every page is a read-only copy, so several tables can share a page.

    Args:
        states: one for each tensor, from `adamw.init` or a file.
        page_size: values in a page, a multiple of 256, so that no block is cut.
        budget: pages that fit on the device, at least 1.

    Raises:
        InputError: if `page_size` or `budget` is out of range.

    Source: QLoRA (arXiv:2305.14314), section 3, "Paged Optimizers".
    """
    check_integer("page_size", page_size)
    check_integer("budget", budget, 1)
    check_kind("states", states, Sequence)
    for state in states:
        check_kind("a state", state, State)
    if page_size < 1 or page_size % adamw.BLOCKSIZE:
        raise InputError(f"page_size is {page_size}; choose a multiple of 256.")
    host: list[State] = []
    pages: list[range] = []
    for state in states:
        cut = _cut(state, page_size)
        pages.append(range(len(host), len(host) + len(cut)))
        host += cut
    shapes = tuple(state.m.shape for state in states)
    return Paged(tuple(host), {}, budget, page_size, tuple(pages), shapes)


def step(
    p: Paged, tensor: int, W: Weight, grad: Weight, config: AdamW
) -> tuple[Weight, Paged]:
    """Take a step on one of the tensors, page by page, with the bits of `adamw.step`.

    Raises:
        InputError: if there is no such tensor, W or its gradient has another shape or
            no float dtype, or the gradient is not finite.
    """
    _check_tensor(p, tensor)
    adamw.check_fits(W, grad, W, W)
    check_kind("the config", config, AdamW)
    if W.shape != p.shapes[tensor]:
        raise InputError(f"W has shape {W.shape}; its state has {p.shapes[tensor]}.")
    old, slope = W.reshape(-1), grad.reshape(-1)
    new = np.empty(W.size, W.dtype)
    for i, page in enumerate(p.pages[tensor]):
        part = slice(i * p.page_size, (i + 1) * p.page_size)
        p = touch(p, page)
        new[part], state = adamw.step(old[part], slope[part], p.device[page], config)
        p = replace(p, device={**p.device, page: _frozen(state)})
    return new.reshape(W.shape), p


def touch(p: Paged, page: int) -> Paged:
    """Put a page on the device as the most recently used; if absent, count a fault.

    Raises:
        InputError: if there is no such page.
    """
    _check_page(p, page)
    if page not in p.device:
        return _bring(p, page, Traffic(faults=1))
    others = {i: state for i, state in p.device.items() if i != page}
    return replace(p, device={**others, page: p.device[page]})


def prefetch(p: Paged, page: int) -> Paged:
    """Put a page on the device before a step touches it, so that no step waits.

    Raises:
        InputError: if there is no such page.
    """
    _check_page(p, page)
    return p if page in p.device else _bring(p, page, Traffic(prefetches=1))


def evict(p: Paged, page: int) -> Paged:
    """Remove a page from the device; if it changed, copy it to the host first.

    Raises:
        InputError: if there is no such page.
    """
    _check_page(p, page)
    if page not in p.device:
        return p
    state, traffic = p.device[page], p.traffic + Traffic(evictions=1)
    if state is not p.host[page]:
        traffic += Traffic(write_backs=1, bytes_out=nbytes(state))
    host = (*p.host[:page], state, *p.host[page + 1 :])
    rest = {i: state for i, state in p.device.items() if i != page}
    return replace(p, host=host, device=rest, traffic=traffic)


def resize(p: Paged, budget: int) -> Paged:
    """Change the budget; remove least recently used pages that no longer fit.

    Raises:
        InputError: if the budget is below 1.
    """
    check_kind("the table p", p, Paged)
    check_integer("budget", budget, 1)
    while len(p.device) > budget:
        p = evict(p, next(iter(p.device)))
    return replace(p, budget=budget)


def gather(p: Paged, tensor: int) -> State:
    """Return the whole state of one tensor, in the form of `adamw` and of files.

    Raises:
        InputError: if there is no such tensor.
    """
    _check_tensor(p, tensor)
    states = [p.device.get(page, p.host[page]) for page in p.pages[tensor]]
    parts = [adamw.to_arrays(state) for state in states]
    whole = {"t": parts[0]["t"]}
    for name in parts[0].keys() - {"t"}:
        flat = np.concatenate([part[name] for part in parts])
        whole[name] = flat if "absmax" in name else flat.reshape(p.shapes[tensor])
    return adamw.from_arrays(whole)


def nbytes(state: State) -> int:
    """Return the bytes of both moments."""
    arrays = adamw.to_arrays(state)
    return sum(array.nbytes for name, array in arrays.items() if name != "t")


def _check_tensor(p: Paged, tensor: int) -> None:
    """Refuse the number of a tensor that is not in the table."""
    check_kind("the table p", p, Paged)
    check_integer("tensor", tensor, 0, len(p.shapes) - 1)


def _check_page(p: Paged, page: int) -> None:
    """Refuse the number of a page that is not in the table."""
    check_kind("the table p", p, Paged)
    check_integer("page", page, 0, len(p.host) - 1)


def _bring(p: Paged, page: int, reason: Traffic) -> Paged:
    while len(p.device) >= p.budget:
        p = evict(p, next(iter(p.device)))
    traffic = p.traffic + reason + Traffic(bytes_in=nbytes(p.host[page]))
    return replace(p, device={**p.device, page: p.host[page]}, traffic=traffic)


def _cut(state: State, page_size: int) -> list[State]:
    arrays = adamw.to_arrays(state)
    cut = []
    for start in range(0, prod(state.m.shape), page_size):
        parts = {"t": arrays["t"]}
        for name in arrays.keys() - {"t"}:
            unit = adamw.BLOCKSIZE if name.endswith("absmax") else 1
            part = slice(start // unit, (start + page_size) // unit)
            parts[name] = arrays[name].reshape(-1)[part]
        cut.append(_frozen(adamw.from_arrays(parts)))
    return cut


def _frozen(state: State) -> State:
    for moment in (state.m, state.v):
        if isinstance(moment, Blockwise):
            moment.packed.setflags(write=False)
            moment.absmax.setflags(write=False)
            moment.codebook.setflags(write=False)
        else:
            moment.setflags(write=False)
    return state
