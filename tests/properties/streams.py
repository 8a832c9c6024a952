"""Streams of the pretended device: calls that wait, and memory that is used again.

A slow stream runs a call only when something waits for it; the other streams run their
calls at once, as far as events allow. Memory is handed out as by CUDA's caching
allocator: memory that a page leaves is free at once for the stream that it came from.
If another stream was recorded, the memory is free only when that stream has reached the
event.
"""

import weakref
from contextlib import contextmanager
from itertools import cycle
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.properties.device import NAME, There


class Event:
    def __init__(self, stream):
        self.stream, self.happened = stream, False


class Stream:
    """A queue of items: a call, an event to set, or an event to wait for."""

    def __init__(self, device=None, slow=False):
        self.queue, self.slow = [], slow
        GPU.streams.append(self)

    def enqueue(self, item):
        self.queue.append(item)
        GPU.run()

    def record_event(self):
        event = Event(self)
        self.enqueue(("set", event))
        return event

    def wait_event(self, event):
        self.enqueue(("wait", event))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        while self.queue:
            self.advance() or self.queue[0][1].stream.reach(self.queue[0][1])

    def reach(self, event):
        while not event.happened:
            self.advance() or self.queue[0][1].stream.reach(self.queue[0][1])

    def advance(self):
        """Run the first item of the queue; return False if the item has to wait."""
        kind, item = self.queue[0]
        if kind == "wait" and not item.happened:
            return False
        self.queue.pop(0)
        if kind == "set":
            item.happened = True
        elif kind == "call":
            item()
        return True


class GPU:
    """All streams, the current stream, and the memory that is free."""

    streams: ClassVar[list[Stream]] = []
    free: ClassVar[list[tuple[torch.Tensor, Stream, list[Event]]]] = []
    current: Stream

    @classmethod
    def run(cls):
        moved = True
        while moved:
            moved = [s for s in cls.streams if not s.slow and s.queue and s.advance()]

    @classmethod
    def allocate(cls, like):
        for i, (memory, stream, events) in enumerate(cls.free):
            fits = (memory.shape, memory.dtype) == (like.shape, like.dtype)
            if fits and stream is cls.current and all(e.happened for e in events):
                cls.free.pop(i)
                return Slot(memory, cls.current)
        return Slot(torch.empty_like(like), cls.current)

    @classmethod
    @contextmanager
    def stream(cls, stream):
        before, cls.current = cls.current, stream
        try:
            yield
        finally:
            cls.current = before

    @classmethod
    def current_stream(cls, device=None):
        return cls.current

    @classmethod
    def start(cls, slow):
        """Reset all; `slow` names the slow streams: computing, inward, outward."""
        cls.streams, cls.free = [], []
        cls.current = Stream(slow="computing" in slow)


class Slot(There):
    """A tensor in device memory; the memory becomes free when the tensor is deleted."""

    def __new__(cls, memory, stream):
        return There.__new__(cls, memory)

    def __init__(self, memory, stream):
        super().__init__(memory)
        self.recorded = []
        weakref.finalize(self, _left, memory, stream, self.recorded)

    def record_stream(self, stream):
        self.recorded.append(stream)


def _left(memory, stream, recorded):
    events = [other.record_event() for other in recorded if other is not stream]
    GPU.free.append((memory, stream, events))


class Copies(TorchDispatchMode):
    """Enqueues copies between host and device on the current stream."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation._schema.name
        device = kwargs.get("device")
        if name == "aten::_to_copy" and device is not None and device.type == NAME:
            (home,) = args
            assert kwargs["non_blocking"]
            slot = GPU.allocate(home)
            memory = slot.here
            GPU.current.enqueue(("call", lambda: memory.copy_(home)))
            return slot
        if name == "aten::copy_" and isinstance(args[1], Slot):
            home, memory = args[0], args[1].here
            assert kwargs.get("non_blocking") or args[2]
            GPU.current.enqueue(("call", lambda: home.copy_(memory)))
            return home
        return operation(*args, **kwargs)


def register(slow):
    """Give the device these streams; `Lanes` makes the inward, then the outward one."""
    module, names = torch.get_device_module(NAME), cycle(("inward", "outward"))

    def stream(device):
        return Stream(device, slow=next(names) in slow)

    module.Event, module.Stream = Event, stream
    module.stream, module.current_stream = GPU.stream, GPU.current_stream
    GPU.start(slow)
