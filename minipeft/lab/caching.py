"""What torch's caching allocator for CUDA takes from a device, by its rules.

It takes memory in segments, hands out parts of them, and gives back only segments of
which no part is in use. So a device is full at more than the bytes of the tensors.
Replayed here without a device, on the storages of a run.

Left out is memory that a second stream still uses when its tensor ends: torch waits
for that stream before it gives anything back or raises an error, so no limit changes.

Source: torch 2.13 with its usual settings. The sizes: `c10/core/AllocatorConfig.h`. The
rules: `get_allocation_size`, `get_free_block`, `should_split`, `alloc_block`,
`release_cached_blocks`, `synchronize_and_free_events`, `try_merge_blocks` and
`BlockComparatorSize` in `c10/cuda/CUDACachingAllocator.cpp`.
"""

from dataclasses import dataclass, field

import torch

UNIT = 512
"""`kMinBlockSize`: every size is rounded up to a multiple."""
SMALL = 2**20
"""`kSmallSize`: up to here a part comes from a small segment."""
SMALL_SEGMENT = 2 * 2**20
"""`kSmallBuffer`: of a small segment."""
LARGE = 10 * 2**20
"""`kMinLargeAlloc`: from here a part gets a segment of its own size."""
LARGE_SEGMENT = 20 * 2**20
"""`large_segment_size`: of the segments between."""
ROUND = 2 * 2**20
"""`kRoundLarge`: a segment of its own size is rounded up to a multiple."""

SETTINGS = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
)
"""Variables of the environment that change the rules."""


@dataclass(eq=False)
class Part:
    """A piece of a segment, in use or free, between its neighbours."""

    size: int
    small: bool
    stream: int
    address: int
    free: bool = False
    before: "Part | None" = None
    after: "Part | None" = None


@dataclass
class CachingAllocator:
    """The allocator of one device.

    Args:
        limit: bytes that it may take, as `torch.cuda.set_per_process_memory_fraction`
            sets them.

    Attributes:
        reserved: bytes that it has taken.
        most: the largest number of them so far.
    """

    limit: float = float("inf")
    reserved: int = 0
    most: int = 0
    unused: list[Part] = field(default_factory=list)
    addresses: int = 0

    def allocate(self, size: int, stream: int = 0) -> Part:
        """Return a part of at least this size.

        Args:
            size: bytes.
            stream: each has segments of its own.

        Raises:
            OutOfMemoryError: not even after every unused segment was given back.
        """
        size = max(UNIT, -(-size // UNIT) * UNIT)
        part = self._found(size, stream)
        if part is None and not self._fits(size):
            self.give_back()
        if part is None and not self._fits(size):
            raise torch.OutOfMemoryError(
                f"out of memory: {self.reserved:,} bytes are taken, a segment of "
                f"{_segment(size):,} more was needed, and {self.limit:,.0f} are allowed"
            )
        return self._cut(part or self._taken(size, stream), size)

    def release(self, part: Part) -> None:
        """Make a part free, together with free neighbours."""
        part.free = True
        for one in (part.before, part.after):
            if one is not None and one.free:
                self.unused.remove(one)
                part = _joined(*((one, part) if one is part.before else (part, one)))
        self.unused.append(part)

    def give_back(self) -> None:
        """Return every segment of which no part is in use to the device."""
        whole = [p for p in self.unused if p.before is None and p.after is None]
        self.reserved -= sum(part.size for part in whole)
        self.unused = [p for p in self.unused if p.before or p.after]

    def _found(self, size: int, stream: int) -> Part | None:
        """Take out the smallest free part that is enough, the lowest of equals."""
        small = size <= SMALL
        fits = [
            part
            for part in self.unused
            if part.size >= size and part.small == small and part.stream == stream
        ]
        part = min(fits, key=lambda p: (p.size, p.address), default=None)
        if part is not None:
            self.unused.remove(part)
        return part

    def _fits(self, size: int) -> bool:
        return self.reserved + _segment(size) <= self.limit

    def _taken(self, size: int, stream: int) -> Part:
        whole = _segment(size)
        self.reserved += whole
        self.most = max(self.most, self.reserved)
        self.addresses += whole
        return Part(whole, size <= SMALL, stream, self.addresses - whole)

    def _cut(self, part: Part, size: int) -> Part:
        left = part.size - size
        part.free = False
        if left >= UNIT if part.small else left > SMALL:
            rest = Part(left, part.small, part.stream, part.address + size, True)
            rest.before, rest.after, part.size = part, part.after, size
            if rest.after:
                rest.after.before = rest
            part.after = rest
            self.unused.append(rest)
        return part


def _segment(size: int) -> int:
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND


def _joined(first: Part, second: Part) -> Part:
    first.size += second.size
    first.after = second.after
    if first.after:
        first.after.before = first
    first.free = True
    return first
