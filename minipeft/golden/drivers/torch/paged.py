"""The page table in the torch column."""

import numpy as np
import torch

from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array
from minipeft.torch import adamw
from minipeft.torch.paged import Page, PageTable, Paging


def paged_trace(
    touched: Array, written: Array, pages: int, budget: int
) -> tuple[Array, ...]:
    """Touch pages in order, write to some; return what each touch caused."""
    size, nobody = adamw.BLOCKSIZE, 255
    table = PageTable(Paging(size, budget).budget)
    part, device = slice(0, size), torch.device("cpu")
    states = [adamw.init(torch.zeros(size)) for _ in range(pages)]
    numbers = {Page(state, part, device): i for i, state in enumerate(states)}
    book, rows = dict(enumerate(numbers)), []
    if not book.keys() >= {*touched.tolist()}:
        raise Unsupported("a page is an object; no number names one that is not there")
    for index, writes in zip(touched, written, strict=True):
        before, resident = table.traffic, set(table.resident)
        table.touch(book[index])
        left = [numbers[page] for page in resident - set(table.resident)]
        faulted = table.traffic.faults - before.faults
        back = table.traffic.write_backs - before.write_backs
        rows.append((faulted, *(left or [nobody]), back))
        book[index].dirty |= bool(writes)
    columns = np.array(rows, np.uint8).reshape(-1, 3).T
    order = np.array([numbers[page] for page in table.resident], np.uint8)
    return *map(np.ascontiguousarray, columns), order
