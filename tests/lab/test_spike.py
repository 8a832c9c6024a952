"""A batch that is longer than the others: counted, and by the rules of an allocator."""

import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minipeft.lab import blocks, caching, memory, spike
from minipeft.lab.blocks import Blocks
from minipeft.lab.card import Card, demand
from minipeft.lab.memory.options import Options
from minipeft.lab.memory_peak import held
from minipeft.lab.storages import live
from minipeft.torch.adamw import AdamW
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
    told = {}
    real, said = blocks.Trial(SMALL, PAGING, "cpu", told.__setitem__).run()
    assert real
    assert "with pages 3 of 3 steps, without pages 1 (out of memory" in said
    assert list(told) == ["limit", "counted", "with pages", "without"]
    assert [len(told[name]["steps"]) for name in ("with pages", "without")] == [3, 1]


def test_the_bits_do_not_depend_on_pages(makers):
    course = SMALL.course(steps=3, at=1)
    torch.manual_seed(1)  # whatever was drawn before
    whole, paged = (spike.attempt(make, course, Card(2**40)) for make in makers)
    assert [step.loss for step in whole.log] == [step.loss for step in paged.log]
    assert all(torch.equal(paged.adapters[k], v) for k, v in whole.adapters.items())
    assert whole.traffic is None
    assert paged.traffic.evictions > 0
    assert paged.log[1].states < paged.log[0].states == whole.log[0].states


@pytest.fixture
def needing(monkeypatch):
    """Let the runs of each kind of optimizer need so many bytes, without running."""
    needs, tried = {}, []

    def run(model, optimizer, course, card):
        tried.append((course.steps, course.at, card.device, card.size))
        steps = course.steps if card.size >= needs[type(optimizer)] else course.at
        log = [spike.StepLog(1.0, 0, 0)] * steps
        return log, "" if steps == course.steps else "CUDA out of memory"

    monkeypatch.setattr(spike, "_run", run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return needs, tried


def test_a_search_ends_at_a_grain_or_when_its_time_is_over(needing):
    needs, tried = needing
    needs[PagedAdamW] = int(5e9)
    course, make = SMALL.course(steps=12, at=7), SMALL.ready(PAGING, "cpu")
    card, between = Card(1, "cuda"), (10**9, 10**10)
    found = spike.narrow(make, card, course, between, time.monotonic() + 60)
    low, high = (int(n.replace(",", "")) for n in re.findall(r"[\d,]{2,}", found))
    assert low <= 5000 <= high <= low + spike.GRAIN / 1e6 + 1
    assert {one[:3] for one in tried} == {(3, 1, "cuda")}
    assert spike.narrow(make, card, course, between, time.monotonic()) == (
        "more than 1,000 MB and at most 10,000"
    )
    between = (10**9, 4 * 10**9)
    late = spike.narrow(make, card, course, between, time.monotonic() + 60)
    assert late == "more than 4,000 MB"


@pytest.fixture
def on_cuda(monkeypatch, needing):
    """A device of 80 GB that computes nothing; its blocks are small, on the host."""
    ready = Blocks.ready
    monkeypatch.setattr(
        Blocks, "ready", lambda self, paging, device: ready(SMALL, paging, "cpu")
    )
    need = spike.Budget(9 * 10**9, 17 * 10**8, 18 * 10**9, 19 * 10**9)
    counts = SimpleNamespace(budget=lambda page: need)
    monkeypatch.setattr(blocks, "counted", lambda _: counts)
    for name in caching.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (79 * 10**9, 8 * 10**10))
    return needing


@pytest.mark.parametrize(("whole", "code"), [(19.2e9, 0), (18.4e9, 1)])
def test_the_stage_tries_the_counted_limit_first_and_writes_as_it_goes(
    on_cuda, tmp_path, capsys, whole, code
):
    needs, tried = on_cuda
    needs.update({PagedAdamW: 18.3e9, AdamW: whole})
    assert blocks.main(str(tmp_path / "spike.json")) == code
    said, last = capsys.readouterr().out.splitlines()
    assert last.startswith(said)
    facts = json.loads((tmp_path / "spike.json").read_text())
    assert tried[0] == tried[1] == (3, 1, "cuda", facts["limit"])
    assert facts["counted"]["least"] < facts["limit"] < facts["counted"]["whole"]
    for name in ("with pages needs", "without pages needs"):
        assert facts[name] in last


def test_a_stage_that_is_stopped_keeps_what_it_found(on_cuda, tmp_path, monkeypatch):
    needs, _ = on_cuda
    needs.update({PagedAdamW: 18.3e9, AdamW: 19.2e9})

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(spike, "narrow", stop)
    assert blocks.main(str(tmp_path / "spike.json")) == 130
    assert "without" in json.loads((tmp_path / "spike.json").read_text())


def test_where_the_count_does_not_hold_the_stage_says_why_and_tries_nothing(
    on_cuda, monkeypatch, capsys
):
    _, tried = on_cuda

    def said():
        assert blocks.main() == 2
        return capsys.readouterr().err

    for name in caching.SETTINGS:
        monkeypatch.setenv(name, "expandable_segments:True")
        assert said().startswith(f"{name} is set to 'expandable_segments:True', and")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert said().startswith("torch's allocator is cudaMallocAsync, which is not")
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (15 * 10**9, 8 * 10**10))
    assert "must be free, and 15,000 of 80,000 are; end what else" in said()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said().startswith("torch sees no CUDA device here, and this is tried on")
    assert tried == []


def test_a_device_that_another_program_filled_meanwhile_decides_nothing(
    on_cuda, monkeypatch, capsys
):
    needs, _ = on_cuda
    needs.update({PagedAdamW: 18.3e9, AdamW: 19.2e9})
    free = iter([79 * 10**9, 10**9])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 8 * 10**10))
    assert blocks.main() == 2
    assert "This tells nothing: " in capsys.readouterr().err


def test_a_trial_says_when_pages_save_nothing():
    one = Paging(page_size=2**20, budget=1000)  # a page holds all of a parameter
    real, said = blocks.Trial(replace(SMALL, usual=64), one, "cpu").run()
    assert not real  # no batch is longer, and half of the states have no room before it
    assert "without pages 0 (out of memory" in said


def test_on_a_large_model_pages_save_more_than_the_allocator_can_spoil():
    """By the rules of the allocator, and by the bytes of the tensors alone."""
    cut = Blocks()
    counted, page = blocks.counted(cut), Paging().page_size
    shape = memory.Architecture(cut.count, 8192, 28672, 64, 8, 32000, 128, tied=False)
    how = {"r": cut.r, "base": "nf4-double", "attention": "eager"}
    formula = Options(**how, optimizer="paged-adamw8", sequence=cut.long).peak(shape)
    in_use = sum(counted.weights) + live(counted.long[0])[0]
    assert abs(in_use / formula.total - 1) < FORMULAS
    states = sum(counted.states())
    assert states == sum(counted.states(page)) > 2 * sum(counted.trained)
    need = counted.budget(page)
    assert (need.states, need.whole) == (states, in_use + states)
    assert [counted.finished(need.size, kept) for kept in (None, page)] == [1, 3]
    decoded = 2 * cut.width * cut.inner
    assert min(need.whole - need.size, need.size - need.least) > decoded
    assert counted.finished(need.least - caching.ROUND, page) < 3
    assert counted.finished(need.least - states, page) == 1  # as chapter 32 tries it
    gradients = 4 * sum(counted.trained)
    step = need.fixed + gradients + states
    assert need.least - step > decoded  # the pass decides, and not the optimizer
    assert counted.least() - need.least > 0.08 * need.size > 500e6


def test_the_bytes_of_a_counted_pass_are_those_that_torch_hands_out(monkeypatch):
    """On a CPU, with the steps of a GPU; the rest is less than the smallest part."""
    small = Blocks(2, 256, 896, 8, 2, vocabulary=500, r=64, usual=64, long=256)
    counted = live(blocks.counted(small).long[0])[0]
    monkeypatch.setattr(blocks, "QuantizedLinear", blocks._AsOnAGPU)
    model, batch = small.model("cpu"), dict(small.batch(small.long))
    handed_out = demand(model, batch, "cpu") - held(model)
    copied = sum(tensor.nbytes for tensor in batch.values())  # to a device, each alone
    assert abs(handed_out + copied - counted) < caching.UNIT


def test_what_cublas_keeps_is_counted():
    """The count is then within one percent of what an H200 needed with pages."""
    earlier, page = blocks.counted(Blocks(r=64, long=512)), Paging().page_size
    without = replace(earlier, weights=earlier.weights[len(blocks.WORKSPACES) :])
    assert earlier.least(page) == without.least(page) + sum(blocks.WORKSPACES)
    assert abs(earlier.least(page) / 10_066e6 - 1) < 0.01


def test_on_a_model_as_small_as_tiny_pages_free_no_segment():
    """As on the H200, where both runs ended at the spike."""
    tiny = Blocks(4, 128, 384, 4, 2, 1024, r=64, usual=64, long=256)
    counted = blocks.counted(tiny)
    assert sum(counted.states()) < caching.SMALL_SEGMENT
    assert counted.least(8192) >= counted.least()
