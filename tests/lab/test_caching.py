"""The rules of torch's caching allocator for CUDA, and the storages it is given."""

import gc
import re
from pathlib import Path

import pytest
import torch

from minipeft.lab import caching
from minipeft.lab.caching import CachingAllocator
from minipeft.lab.storages import Event, Recorder, live

MB = 2**20


def test_the_sizes_are_those_of_the_installed_torch():
    header = Path(torch.__file__).parent / "include" / "c10" / "core"
    text = (header / "AllocatorConfig.h").read_text()
    assert "large_segment_size_{20971520}" in text
    found = dict(re.findall(r"constexpr size_t (k\w+) = (\d+);", text))
    assert {name: int(size) for name, size in found.items()} == {
        "kSmallBuffer": caching.SMALL_SEGMENT,
        "kMinBlockSize": caching.UNIT,
        "kSmallSize": caching.SMALL,
        "kMinLargeAlloc": caching.LARGE,
        "kRoundLarge": caching.ROUND,
    }
    assert caching.LARGE_SEGMENT == 20971520


@pytest.mark.parametrize(
    ("size", "taken"),
    [
        (1, 2 * MB),
        (MB, 2 * MB),
        (MB + 1, 20 * MB),
        (10 * MB - 512, 20 * MB),
        (10 * MB, 10 * MB),
        (10 * MB + 1, 12 * MB),
        (21 * MB, 22 * MB),
    ],
)
def test_a_tensor_takes_a_segment_by_its_size(size, taken):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved == taken


def test_small_tensors_share_a_segment_in_units_of_512_bytes():
    allocator = CachingAllocator()
    parts = [allocator.allocate(513) for _ in range(2 * MB // 1024)]
    assert allocator.reserved == 2 * MB
    assert {part.address for part in parts} == {1024 * i for i in range(len(parts))}
    allocator.allocate(1)
    assert allocator.reserved == 4 * MB


def test_a_segment_is_given_back_only_whole():
    allocator = CachingAllocator()
    first, second = allocator.allocate(MB), allocator.allocate(MB)
    allocator.release(first)
    allocator.give_back()
    assert allocator.reserved == 2 * MB
    allocator.release(second)
    allocator.give_back()
    assert allocator.reserved == 0


def test_free_neighbours_become_one_part():
    allocator = CachingAllocator()
    parts = [allocator.allocate(5 * MB) for _ in range(4)]
    assert allocator.reserved == 20 * MB
    for part in (parts[0], parts[2], parts[1]):
        allocator.release(part)
    assert allocator.allocate(9 * MB).address == 0
    assert allocator.reserved == 20 * MB


def test_the_smallest_part_that_is_enough_is_used():
    allocator = CachingAllocator()
    large, small = allocator.allocate(30 * MB), allocator.allocate(12 * MB)
    allocator.release(large)
    allocator.release(small)
    assert allocator.allocate(11 * MB).address == 30 * MB
    assert allocator.reserved == 42 * MB


def test_a_rest_of_a_large_segment_of_up_to_1_mb_is_not_cut_off():
    allocator = CachingAllocator()
    assert allocator.allocate(11 * MB).size == 12 * MB
    assert allocator.allocate(12 * MB).size == 12 * MB
    again = CachingAllocator()
    whole = again.allocate(20 * MB)
    again.release(whole)
    assert again.allocate(18 * MB + 512 * 1024).size == 18 * MB + 512 * 1024


def test_a_stream_has_segments_of_its_own():
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(MB, stream=1))
    allocator.allocate(MB, stream=0)
    assert allocator.reserved == 4 * MB


def test_the_limit_counts_what_is_taken_and_unused_segments_go_first():
    allocator = CachingAllocator(limit=42 * MB)
    kept, other = allocator.allocate(20 * MB), allocator.allocate(20 * MB)
    with pytest.raises(torch.OutOfMemoryError, match="41,943,040 bytes are taken"):
        allocator.allocate(10 * MB)
    allocator.release(other)
    allocator.allocate(22 * MB)  # the segment of `other` is given back for it
    assert allocator.reserved == 42 * MB == allocator.most
    assert not kept.free


REFUSED = -1
# Each step: a name, MB that it asks for (None: it ends), its stream, then where its
# part begins (REFUSED: an error) and what is reserved, in MB, by reading the source.
TRACES = {
    # alloc_block: refused if total_allocated_memory + size > allowed_memory_maximum
    "the limit itself may be reached": (
        40,
        [("a", 20, 0, 0, 20), ("b", 20, 0, 20, 40), ("c", 2, 0, REFUSED, 40)],
    ),
    # release_cached_blocks: all streams and both pools, before the second try
    "a refusal has given back all that was unused": (
        44,
        [
            ("small", 1, 0, 0, 2),
            ("other", 20, 1, 2, 22),
            ("small", None, 0, None, 22),
            ("other", None, 1, None, 22),
            ("kept", 20, 0, 22, 42),
            ("more", 30, 0, REFUSED, 20),
        ],
    ),
    # release_blocks: a segment with a part in use stays whole
    "a part in use keeps its segment": (
        40,
        [
            ("a", 8, 0, 0, 20),
            ("b", 8, 0, 8, 20),
            ("a", None, 0, None, 20),
            ("c", 24, 0, REFUSED, 20),
        ],
    ),
    # get_free_block: the smallest that is enough, however much larger it is
    "a small tensor in the hole of a weight makes the next weight a new segment": (
        1000,
        [
            ("weight", 448, 0, 0, 448),
            ("weight", None, 0, None, 448),
            ("small", 2, 0, 0, 448),
            ("weight", 448, 0, 448, 896),
        ],
    ),
    # should_split: in a large segment only a rest of more than 1 MB is cut off
    "a rest of more than 1 MB is cut off": (
        1000,
        [("a", 18.5, 0, 0, 20), ("b", 1.5, 0, 18.5, 20)],
    ),
    # BlockComparatorSize: stream, then size, then address
    "of equals the lowest address is taken": (
        1000,
        [
            ("a", 12, 0, 0, 12),
            ("b", 12, 0, 12, 24),
            ("b", None, 0, None, 24),
            ("a", None, 0, None, 24),
            ("c", 12, 0, 0, 24),
        ],
    ),
    # get_pool: by the size alone
    "a tensor of 1 MB does not go into a large segment": (
        1000,
        [("a", 20, 0, 0, 20), ("a", None, 0, None, 20), ("b", 1, 0, 20, 22)],
    ),
    # try_merge_blocks: neighbours within a segment
    "two segments do not become one part": (
        1000,
        [
            ("a", 12, 0, 0, 12),
            ("b", 12, 0, 12, 24),
            ("a", None, 0, None, 24),
            ("b", None, 0, None, 24),
            ("c", 24, 0, 24, 48),
        ],
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_goes_as_in_the_source_of_torch(name):
    limit, steps = TRACES[name]
    allocator, held = CachingAllocator(limit * MB), {}
    for key, size, stream, address, reserved in steps:
        if size is None:
            allocator.release(held.pop(key))
        elif address == REFUSED:
            with pytest.raises(torch.OutOfMemoryError):
                allocator.allocate(int(size * MB), stream)
        else:
            held[key] = allocator.allocate(int(size * MB), stream)
            assert held[key].address == address * MB
        assert allocator.reserved == reserved * MB


def three(device):
    a = torch.zeros(256, device=device)
    b = a + 1
    del a
    c = b.view(-1)  # the same storage
    return c * 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_are_noted_as_they_come_and_go(device):
    recorder = Recorder()
    with recorder:
        kept = three(device)
    assert live(recorder.events) == (2048, 1024)
    assert [event.size for event in recorder.events] == [1024, 1024, None, 1024, None]
    del kept
    gc.collect()
    assert live(recorder.events) == (2048, 0)


def test_what_lives_is_counted():
    events = [Event(0, 5), Event(1, 7), Event(0), Event(2, 1)]
    assert live(events) == (12, 8)
