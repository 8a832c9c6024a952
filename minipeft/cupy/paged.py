"""Paged optimizer states on a GPU: the reference's paging, in managed memory.

The states are stored in memory that the device and the host can both access. A page is
a slice of the states. `touch` moves a page to the device, `evict` moves it to the host.
Only one copy exists, so a step changes it in place. Where the reference copies a page,
this module moves it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from minipeft.cupy import adamw
from minipeft.cupy.adamw import AdamW, State
from minipeft.cupy.blockwise import Blockwise
from minipeft.cupy.executor import HOST, Array, Executor, current
from minipeft.errors import InputError
from minipeft.kernels import FIRST_BAD
from minipeft.kernels.checks import Facts
from minipeft.kernels.tables import adamw_settings


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
        return Traffic(*map(sum, zip(astuple(self), astuple(more), strict=True)))


@dataclass(frozen=True)
class Paged:
    """States in managed memory; at most `budget` of their pages are on the device."""

    states: tuple[State, ...]  # of each tensor, whole
    device: Mapping[int, bool]  # the least recently used first; True: changed there
    budget: int
    page_size: int
    pages: tuple[range, ...]  # of each tensor
    traffic: Traffic = Traffic()


def zeros(W: Any, bits: int = 32) -> State:
    """Start as `adamw.init` does; the state is never on the device as a whole.

    Args:
        W: the parameter; only its shape, dtype and device matter.
        bits: of the state, 32 or 8.

    Raises:
        InputError: as `adamw.init`; if the device cannot page.
    """
    return adamw.zeros(W, bits, current().home)


def init(states: Sequence[State], page_size: int, budget: int) -> Paged:
    """Move the states of some tensors to managed memory, all pages on the host.

    Args:
        states: one for each tensor, from `zeros`, or from `adamw.init`, then copied.
        page_size: values in a page, a multiple of 256, so that no block is cut.
        budget: pages that fit on the device, at least 1.

    Raises:
        InputError: if `page_size` or `budget` is out of range, or the device cannot
            page.

    Source: QLoRA (arXiv:2305.14314), section 3, "Paged Optimizers".
    """
    if page_size < 1 or page_size % adamw.BLOCKSIZE:
        raise InputError(f"page_size is {page_size}; choose a multiple of 256.")
    gpu = current()
    managed, pages, first = [], [], 0
    for state in states:
        arrays = [gpu.managed(array) for array in _arrays(state)]
        for array in arrays:
            gpu.move(array, HOST)
        managed.append(replace(adamw.rebuild(state, arrays), t=state.t))
        count = -(-_size(state) // page_size)
        pages.append(range(first, first + count))
        first += count
    p = Paged(tuple(managed), {}, budget, page_size, tuple(pages))
    return resize(p, budget)


def step(
    p: Paged, tensor: int, W: Any, grad: Any, config: AdamW
) -> tuple[Array, Paged]:
    """Take a step on one of the tensors, page by page, with the bits of `adamw.step`.

    With a budget of 2 or more, the next page is moved while one is in use. The states
    of `p` are changed; use the returned object from then on.

    Raises:
        InputError: as `adamw.step`, and then nothing was changed.
    """
    gpu = current()
    W, grad = gpu.adopt(W), gpu.adopt(grad)
    facts = adamw.check_gradient(gpu, W, grad)
    state = p.states[tensor]
    adamw.parts(gpu, state, facts)
    bad = _check_finite(gpu, grad, facts, isinstance(state.m, Blockwise))
    settings = adamw_settings(vars(config), state.t + 1)
    new = gpu.empty(facts.shape, facts.dtype, facts.device)
    flat = [array.reshape(-1) for array in (W, grad, new)]
    for page in p.pages[tensor]:
        p = touch(p, page)
        gpu.arrived(facts.device)
        if page + 1 in p.pages[tensor] and p.budget > 1:
            p = prefetch(p, page + 1)
        part = _part(p, page)
        old, slope, out = (array[part] for array in flat)
        cut = replace(facts, shape=(gpu.facts(old).size,))
        arrays = _slices(p, page)
        adamw.launch(gpu, cut, [old, slope, *arrays], [out, *arrays, bad], settings)
        p = replace(p, device={**p.device, page: True})
    after = replace(state, t=state.t + 1)
    return new, replace(p, states=(*p.states[:tensor], after, *p.states[tensor + 1 :]))


def touch(p: Paged, page: int) -> Paged:
    """Put a page on the device as the most recently used; if absent, count a fault."""
    if page not in p.device:
        return _bring(p, page, Traffic(faults=1))
    others = {i: changed for i, changed in p.device.items() if i != page}
    return replace(p, device={**others, page: p.device[page]})


def prefetch(p: Paged, page: int) -> Paged:
    """Put a page on the device before a step touches it, so that no step waits."""
    return p if page in p.device else _bring(p, page, Traffic(prefetches=1))


def evict(p: Paged, page: int) -> Paged:
    """Move a page to the host; if it changed, count a write-back."""
    if page not in p.device:
        return p
    traffic = p.traffic + Traffic(evictions=1)
    if p.device[page]:
        traffic += Traffic(write_backs=1, bytes_out=_move(p, page, HOST))
    else:
        _move(p, page, HOST)
    rest = {i: changed for i, changed in p.device.items() if i != page}
    return replace(p, device=rest, traffic=traffic)


def resize(p: Paged, budget: int) -> Paged:
    """Change the budget; evict the least recently used pages that no longer fit."""
    if budget < 1:
        raise InputError(f"budget is {budget}; the device must hold at least 1 page.")
    while len(p.device) > budget:
        p = evict(p, next(iter(p.device)))
    return replace(p, budget=budget)


def gather(p: Paged, tensor: int) -> State:
    """Return the whole state of one tensor, in the form of `adamw` and of files."""
    return p.states[tensor]


def _bring(p: Paged, page: int, reason: Traffic) -> Paged:
    last = p.pages[-1].stop - 1
    if not 0 <= page <= last:
        raise InputError(f"page is {page}; choose 0 to {last}.")
    while len(p.device) >= p.budget:
        p = evict(p, next(iter(p.device)))
    arrived = _move(p, page, current().facts(_slices(p, page)[0]).device)
    traffic = p.traffic + reason + Traffic(bytes_in=arrived)
    return replace(p, device={**p.device, page: False}, traffic=traffic)


def _move(p: Paged, page: int, device: int) -> int:
    gpu, arrays = current(), _slices(p, page)
    for array in arrays:
        gpu.move(array, device)
    return sum(array.nbytes for array in arrays)


def _slices(p: Paged, page: int) -> list[Array]:
    tensor = next(i for i, pages in enumerate(p.pages) if page in pages)
    arrays, part = _arrays(p.states[tensor]), _part(p, page)
    block = slice(part.start // adamw.BLOCKSIZE, part.stop // adamw.BLOCKSIZE)
    units = [part, part, block, block]
    return [array.reshape(-1)[unit] for array, unit in zip(arrays, units, strict=False)]


def _part(p: Paged, page: int) -> slice:
    pages = next(pages for pages in p.pages if page in pages)
    start = (page - pages.start) * p.page_size
    return slice(start, start + p.page_size)


def _arrays(state: State) -> list[Array]:
    m, v = state.m, state.v
    if isinstance(m, Blockwise) and isinstance(v, Blockwise):
        return [m.packed, v.packed, m.absmax, v.absmax]
    return [m, v]


def _size(state: State) -> int:
    m = state.m
    return int((m.packed if isinstance(m, Blockwise) else m).size)


def _check_finite(gpu: Executor, grad: Array, facts: Facts, eight_bits: bool) -> Array:
    # An 8-bit moment needs a finite scale, so the square of a gradient must be finite.
    largest = np.finfo(np.float32).max
    limit = np.sqrt(largest) if eight_bits else largest
    bad = gpu.upload(np.array([facts.size], np.uint64), facts.device)
    gpu.launch(FIRST_BAD, facts.dtype, [grad, bad, facts.size, limit])
    adamw.check_finite(gpu, grad, int(gpu.download(bad)[0]), facts.size)
    return bad
