"""Bugs of paging."""

from collections import OrderedDict

import numpy as np

from tests.impls.broken import bug

NOBODY = 255


def trace(touched, written, pages, budget, keeps_order=True, oldest=False, clean=None):
    """Run a page table; every argument after `budget` is a mistake."""
    if budget < 1:
        raise ValueError("no room for a single page")
    device, dirty, rows = OrderedDict(), set(), []
    for page, writes in zip(touched.tolist(), written.tolist(), strict=True):
        faulted, left, back = page not in device, NOBODY, 0
        if faulted and len(device) == budget:
            left = next(iter(device))
            del device[left]
            back = int(left in dirty) if clean is None else clean
            dirty.discard(left)
        device[page] = None
        if keeps_order or oldest:
            device.move_to_end(page, last=not oldest)
        rows.append((faulted, left, back))
        if writes:
            dirty.add(page)
    columns = np.array(rows, np.uint8).reshape(-1, 3).T
    return *map(np.ascontiguousarray, columns), np.array([*device], np.uint8)


def known(touched, written, pages, budget):
    """Wrap a page table so that it refuses pages that it does not have."""
    if (touched >= pages).any():
        raise ValueError("no such page")
    return trace(touched, written, pages, budget)


@bug("paged_trace", "LeastRecentlyUsed")
def sends_away_what_came_first(touched, written, pages, budget):
    return trace(touched, written, pages, budget, keeps_order=False)


@bug("paged_trace", "Loop")
def sends_away_what_was_used_last(touched, written, pages, budget):
    if budget >= pages:
        return trace(touched, written, pages, budget)
    return trace(touched, written, pages, budget, oldest=True)


@bug("paged_trace", "Dirty")
def never_writes_back(touched, written, pages, budget):
    return trace(touched, written, pages, budget, clean=0)


@bug("paged_trace", "OnePage")
def writes_every_page_back(touched, written, pages, budget):
    return trace(touched, written, pages, budget, clean=1)


@bug("paged_trace", "Fits")
def fetches_every_touch(touched, written, pages, budget):
    faulted, *rest = trace(touched, written, pages, budget)
    return np.ones_like(faulted), *rest


@bug("paged_trace", "OutOfRange", "page 3 of 3", "page 8 of 3")
def wraps_the_number_of_a_page(touched, written, pages, budget):
    return trace(touched % np.uint8(pages), written, pages, budget)


@bug("paged_trace", "ShapeMismatch", "written is one short")
def leaves_the_last_page_clean(touched, written, pages, budget):
    missing = max(0, len(touched) - len(written))
    return known(touched, np.pad(written, (0, missing)), pages, budget)


@bug("paged_trace", "OutOfRange", "a budget of 0")
def makes_room_for_one(touched, written, pages, budget):
    return known(touched, written, pages, max(budget, 1))
