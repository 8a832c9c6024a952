"""The page table in the CuPy column."""

import numpy as np

from minipeft.cupy import adamw, paged
from minipeft.cupy.adamw import AdamW
from minipeft.cupy.executor import current
from minipeft.golden.tensors import Array

DEVICE = 0


def paged_trace(
    touched: Array, written: Array, pages: int, budget: int
) -> tuple[Array, ...]:
    """Touch pages in order, write to some; return what each touch caused."""
    size, nobody = adamw.BLOCKSIZE, 255
    zero = current().full((size,), "float32", 0, DEVICE)
    p = paged.init([adamw.init(zero) for _ in range(pages)], size, budget)
    rows = []
    for page, writes in zip(touched, written, strict=True):
        before, after = p, paged.touch(p, int(page))
        left = [i for i in before.device if i not in after.device]
        back = after.traffic.write_backs - before.traffic.write_backs
        faulted = after.traffic.faults - before.traffic.faults
        rows.append((faulted, *(left or [nobody]), back))
        p = paged.step(after, int(page), zero, zero, AdamW())[1] if writes else after
    columns = np.array(rows, np.uint8).reshape(-1, 3).T
    return *map(np.ascontiguousarray, columns), np.array([*p.device], np.uint8)
