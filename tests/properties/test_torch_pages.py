"""Waits of a page of the torch column, on streams that only note the calls."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from minipeft.torch import paged
from minipeft.torch.paged import Page, PageTable


class Stream:
    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def record_event(self):
        return f"what {self.name} did"

    def wait_event(self, event):
        self.notes.append(event)

    def wait_stream(self, other):
        self.notes.append(other.name)


def test_a_page_leaves_after_the_step_that_changed_it_on_whatever_stream(monkeypatch):
    notes = []
    lanes = SimpleNamespace(
        outward=Stream("outward", notes), on=lambda _: nullcontext()
    )
    monkeypatch.setattr(PageTable, "_lanes", lambda *_: lanes)
    monkeypatch.setattr(paged, "_record", lambda *_: None)
    page = Page({"m": torch.zeros(4)}, slice(0, 4), torch.device("cpu"))
    page.copy, table = {"m": torch.ones(4)}, PageTable(1)
    lanes.computing = Stream("the first", notes)
    table.mark(page)
    lanes.computing = Stream("another", notes)
    table.write_back(page)
    assert notes == ["another", "what the first did"]
    assert torch.equal(page.host["m"], torch.ones(4))
