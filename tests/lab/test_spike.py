"""A batch that is longer than the others: counted, and by the rules of an allocator."""

from dataclasses import replace

import pytest
import torch

from minipeft.lab import blocks, caching, memory, spike
from minipeft.lab.blocks import Blocks
from minipeft.lab.card import Card
from minipeft.lab.memory.options import Options
from minipeft.lab.storages import live
from minipeft.torch.paged import PagedAdamW, Paging

SMALL = Blocks(1, 128, 256, 4, 2, vocabulary=64, r=32, usual=8, long=64)
FORMULAS = 0.05
"""The band that the formulas of memory promise on models that are not tiny."""
PAGING = Paging(page_size=1024, budget=1000)


@pytest.fixture(scope="module")
def makers():
    return [SMALL.ready(pages, "cpu") for pages in (None, PAGING)]


@pytest.mark.parametrize(("least", "start"), [(7, 1), (7, 50), (12, 12), (1, 5)])
def test_the_smallest_number_that_is_enough_is_found(least, start):
    found = spike.smallest(lambda n: n >= 3 * least, start, grain=3)
    assert found == 3 * least


def test_pages_save_a_run_on_a_card_with_room_for_half_of_the_states():
    real, said = blocks.trial(SMALL, PAGING, "cpu")
    assert real
    assert "without pages 1 of 3 steps (out of memory" in said
    assert said.endswith("with pages 3")


def test_the_bits_do_not_depend_on_pages(makers):
    course = SMALL.course(steps=3, at=1)
    torch.manual_seed(1)  # whatever was drawn before
    whole, paged = (spike.attempt(make, course, Card(2**40)) for make in makers)
    assert [step.loss for step in whole.log] == [step.loss for step in paged.log]
    assert all(torch.equal(paged.adapters[k], v) for k, v in whole.adapters.items())
    assert whole.traffic is None
    assert paged.traffic.evictions > 0
    assert paged.log[1].states < paged.log[0].states == whole.log[0].states


def test_on_cuda_sizes_are_tried_on_three_steps(monkeypatch):
    tried = []

    def run(model, optimizer, course, card):
        tried.append((course.steps, course.at, card.device))
        return [], "" if card.size >= 5e9 else "out of memory"

    monkeypatch.setattr(spike, "_run", run)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**36))
    course = SMALL.course(steps=12, at=7)
    least = spike.least(SMALL.ready(PAGING, "cpu"), course, "cuda")
    assert 0 <= least - 5e9 < spike.GRAIN
    assert set(tried) == {(3, 1, "cuda")}


def test_on_cuda_the_limit_is_half_way_between_what_both_runs_need(monkeypatch):
    needs = {True: 3 * spike.GRAIN, False: 9 * spike.GRAIN}

    def run(model, optimizer, course, card):
        need = needs[isinstance(optimizer, PagedAdamW)]
        return [], "" if card.size >= need else "out of memory"

    monkeypatch.setattr(spike, "_run", run)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**36))
    makers = [SMALL.ready(pages, "cpu") for pages in (None, PAGING)]
    found = spike.budget(*makers, SMALL.course(steps=3, at=1), "cuda")
    assert (found.least, found.whole) == (needs[True], needs[False])
    assert found.size == 6 * spike.GRAIN


def test_a_device_that_is_too_small_for_the_model_is_an_error(monkeypatch):
    monkeypatch.setattr(spike, "_run", lambda *_: ([], "CUDA out of memory"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**33))
    course, make = SMALL.course(steps=3, at=1), SMALL.ready(PAGING, "cpu")
    with pytest.raises(torch.OutOfMemoryError, match="all 8,590 MB of the device"):
        spike.least(make, course, "cuda")


def test_a_trial_says_when_pages_save_nothing():
    one = Paging(page_size=2**20, budget=1000)  # a page holds all of a parameter
    real, said = blocks.trial(replace(SMALL, usual=64), one, "cpu")
    assert not real  # no batch is longer, and half of the states have no room before it
    assert "without pages 0 of 3 steps" in said


def test_on_a_large_model_pages_are_more_than_the_allocators_segments():
    """By the rules of the allocator, three blocks of Llama 2 70B."""
    three = Blocks(count=3)
    counted, page = blocks.counted(three), Paging().page_size
    shape = memory.Architecture(3, 8192, 28672, 64, 8, 32000, 128, tied=False)
    how = {"r": 64, "base": "nf4-double", "attention": "eager"}
    formula = Options(**how, optimizer="paged-adamw8", sequence=three.long).peak(shape)
    in_use = sum(counted.weights) + live(counted.long[0])[0]
    assert abs(in_use / formula.total - 1) < FORMULAS
    states = sum(counted.states())
    assert states == sum(counted.states(page)) > 2 * sum(counted.trained)
    with_pages = counted.least(page)
    limit = with_pages + states // 2
    assert [counted.finished(limit, kept) for kept in (None, page)] == [1, 3]
    margin = min(counted.least() - limit, limit - with_pages)
    assert margin > caching.LARGE_SEGMENT
    assert counted.finished(with_pages - caching.ROUND, page) < 3


def test_on_a_model_as_small_as_tiny_pages_free_no_segment():
    """As on the H200, where both runs ended at the spike."""
    tiny = Blocks(4, 128, 384, 4, 2, 1024, usual=64, long=256)
    counted = blocks.counted(tiny)
    assert sum(counted.states()) < caching.SMALL_SEGMENT
    assert counted.least(8192) >= counted.least()
