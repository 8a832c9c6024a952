"""The largest number of bytes that live at one time while something runs."""

import os
from collections.abc import Callable
from typing import Any

import torch
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
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [
        e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    held = torch.tensor(
        [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    )
    return int(held.cumsum(0).max())
