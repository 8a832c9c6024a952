"""The largest number of bytes that live at one time while something runs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

# The profiler writes two lines of its own for every use, below this level.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """Return the peak of what torch's allocator hands out during `run`.

    Counted from where the run begins: weights that live already are not in it. The
    first call warms up what is made once and kept.

    Args:
        run: what is looked at.
        device: whose allocator: `cpu` or `cuda`.
    """
    run()
    with watched(device) as found:
        run()
    return found[0]


@contextmanager
def watched(device: str = "cpu") -> Iterator[list[int]]:
    """Note the peak of what the allocator hands out inside, from where it begins.

    Args:
        device: as in `peak_bytes`.

    Yields:
        a list that holds the bytes, once the block is left.
    """
    found: list[int] = []
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield found
    events = [
        e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    found.append(int(torch.tensor([0, *sizes]).cumsum(0).max()))


def unwatched() -> bool:
    """Tell whether torch's profiler is free: there is one, and a second ends it."""
    return not torch._C._autograd._profiler_enabled()


def held(*owners: nn.Module | torch.optim.Optimizer) -> int:
    """Return the bytes that models and optimizers keep, each storage once."""
    tensors = [t for owner in owners for t in _tensors(owner)]
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(store.nbytes() for store in stores.values())


def _tensors(owner: nn.Module | torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    if isinstance(owner, nn.Module):
        yield from owner.parameters()
        yield from owner.buffers()
        return
    for state in owner.state.values():
        yield from (v for v in state.values() if isinstance(v, torch.Tensor))
