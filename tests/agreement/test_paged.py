"""Paged AdamW in torch has the bits of plain AdamW, for any budget and any order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import adamw as reference
from minipeft.reference import paged as reference_paged
from minipeft.torch.adamw import AdamW
from minipeft.torch.paged import PagedAdamW, Paging
from tests.strategies import seeds
from tests.tolerance import assert_bits

SHAPES = [(17, 31), (64, 66), (5,)]
pagings = st.builds(Paging, st.sampled_from([256, 512, 4096]), st.integers(1, 9))
NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = pytest.param("cuda", marks=NEEDS_CUDA)


def parameters(seed, device="cpu"):
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    return [torch.nn.Parameter(torch.from_numpy(W).to(device)) for W in weights]


def descend(optimizer, rng, idle=()):
    """Take one step along random gradients; `idle` parameters have no gradient."""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            grad = rng.standard_normal(p.shape).astype(np.float32)
            p.grad = None if i in idle else torch.from_numpy(grad).to(p.device)
    optimizer.step()


def assert_same(a, b):
    """Check that two optimizers hold the same parameters and states, bit for bit."""
    mine, yours = a.state_dict()["state"], b.state_dict()["state"]
    assert mine.keys() == yours.keys()
    for i in mine:
        assert mine[i].keys() == yours[i].keys()
        assert mine[i]["step"] == yours[i]["step"]
        for name in mine[i].keys() - {"step"}:
            assert_bits(mine[i][name].cpu().numpy(), yours[i][name].cpu().numpy())
    for p, q in zip(
        a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True
    ):
        assert_bits(p.detach().cpu().numpy(), q.detach().cpu().numpy())


@pytest.mark.parametrize("device", [CUDA])  # for the CPU: test_states
@given(seed=seeds, bits=st.sampled_from([8, 32]), paging=pagings, data=st.data())
def test_paging_never_touches_the_arithmetic(device, seed, bits, paging, data):
    mine, yours = parameters(seed, device), parameters(seed, device)
    paged = PagedAdamW(mine, lr=0.02, bits=bits, paging=paging)
    plain = AdamW(yours, lr=0.02, bits=bits)
    for k in range(4):
        idle = data.draw(st.sets(st.integers(0, 2), max_size=2))
        for optimizer in (paged, plain):
            descend(optimizer, np.random.default_rng([seed, k]), idle)
        assert len(paged.table.resident) <= paged.table.budget
        paged.table.resize(data.draw(st.integers(1, 9)))
        pages = [page for pages in paged.pages.values() for page in pages]
        for page in data.draw(st.lists(st.sampled_from(pages), max_size=6)):
            verb = data.draw(st.sampled_from(["touch", "prefetch", "evict"]))
            getattr(paged.table, verb)(page)
            assert len(paged.table.resident) <= paged.table.budget
    assert_same(paged, plain)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("page_size", [256, 512, 4096])
def test_with_room_for_one_page_it_moves_what_the_reference_moves(page_size, bits):
    # The number of moved bytes does not depend on values. With a larger budget the
    # optimizer prefetches the next page; in the reference the caller does that.
    params = parameters(0)
    states = [reference.init(p.detach().numpy(), bits) for p in params]
    theirs = reference_paged.init(states, page_size, 1)
    ours = PagedAdamW(params, bits=bits, paging=Paging(page_size, 1))
    for k in range(3):
        rng = np.random.default_rng(k)
        for i, shape in enumerate(SHAPES):
            grad = rng.standard_normal(shape).astype(np.float32)
            W = np.zeros(shape, np.float32)
            _, theirs = reference_paged.step(theirs, i, W, grad, reference.AdamW())
        descend(ours, np.random.default_rng(k))
    assert vars(ours.table.traffic) == vars(theirs.traffic)


def test_with_room_for_two_only_the_first_page_is_waited_for():
    p = torch.nn.Parameter(torch.ones(2560))
    ours = PagedAdamW([p], paging=Paging(256, 2))
    p.grad = torch.ones(2560)
    ours.step()
    traffic = ours.table.traffic
    assert (traffic.faults, traffic.prefetches) == (1, 9)
    assert traffic.bytes_in == 2560 * 8
    assert traffic.write_backs == traffic.evictions == 8


def stepped(budget):
    """Return an optimizer with four pages, after one step."""
    p = torch.nn.Parameter(torch.ones(1024))
    ours = PagedAdamW([p], paging=Paging(256, budget))
    p.grad = torch.arange(1024.0)
    ours.step()
    return ours, ours.pages[p]


def test_what_was_written_back_and_only_read_since_is_not_written_back_again():
    ours, pages = stepped(budget=1)
    ours.state_dict()
    before = ours.table.traffic
    assert before.write_backs == 4
    for page in (*pages, *pages):
        ours.table.touch(page)
    assert ours.table.traffic.faults == before.faults + 8
    assert ours.table.traffic.write_backs == 4


def test_a_page_on_the_device_is_a_copy_until_it_is_written_back():
    ours, pages = stepped(budget=4)
    for page in pages:
        assert not torch.equal(page.host["m"], page.copy["m"])
        ours.table.write_back(page)
        assert torch.equal(page.host["m"], page.copy["m"])
        ours.table.evict(page)
        brought = ours.table.touch(page)  # no step came between
        assert torch.equal(page.host["m"], brought["m"])
        assert page.host["m"].data_ptr() != brought["m"].data_ptr()


def test_a_page_that_has_left_holds_no_memory_on_the_device():
    ours, pages = stepped(budget=4)
    ours.table.evict(pages[2])
    assert [page.copy is None for page in pages] == [False, False, True, False]
    before = ours.table.traffic
    ours.table.evict(pages[2])  # an absent page: nothing happens
    assert ours.table.traffic == before


def test_saved_states_are_copies():
    ours, _ = stepped(budget=2)
    saved = ours.state_dict()
    kept = saved["state"][0]["m"].clone()
    other = PagedAdamW([torch.nn.Parameter(torch.ones(1024))], paging=Paging(256, 2))
    other.load_state_dict(saved)
    descend(other, np.random.default_rng(0))
    other.state_dict()
    assert torch.equal(saved["state"][0]["m"], kept)


@pytest.mark.parametrize("device", [CUDA])
def test_states_are_pinned_and_pages_are_on_the_device(device):
    p = torch.nn.Parameter(torch.ones(1024, device=device))
    ours = PagedAdamW([p], paging=Paging(256, 2))
    p.grad = torch.ones_like(p)
    ours.step()
    assert ours.state[p]["m"].is_pinned()
    assert all(page.copy["m"].is_cuda for page in ours.table.resident)


@pytest.mark.parametrize("bad", [0, -256, 100])
def test_a_page_that_cuts_a_block_is_refused(bad):
    with pytest.raises(InputError, match=f"page_size is {bad}; choose a multiple of"):
        Paging(page_size=bad)


@pytest.mark.parametrize("bad", [0, -1])
def test_a_device_without_room_for_one_page_is_refused(bad):
    ours = PagedAdamW([torch.nn.Parameter(torch.ones(3))])
    for attempt in (lambda: Paging(budget=bad), lambda: ours.table.resize(bad)):
        with pytest.raises(InputError, match=f"budget is {bad}; choose 1 or more"):
            attempt()
