"""The executor's calls of CuPy: the right device, stream and order, recorded."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minipeft.cupy import adamw, double_quant, executor, managed
from minipeft.cupy.executor import HOST, CupyExecutor
from minipeft.errors import InputError
from minipeft.kernels import FIRST_BAD, driver


class FakeArray:
    """An array on the device that was current when the array was made."""

    cuda: "FakeCuda"

    def __init__(self, shape, dtype, memory):
        self.device = self.cuda.Device(self.cuda.here)
        self.data = SimpleNamespace(ptr=0x100, mem=memory)
        self.dtype, self.shape = np.dtype(dtype), shape
        self.itemsize, self.nbytes = self.dtype.itemsize, 32
        self.flags = SimpleNamespace(c_contiguous=True)

    def fill(self, value):
        self.cuda.notes.append(("fill", self.cuda.here))


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name, self.ptr = cuda, name, hash(name)

    def record(self):
        event = SimpleNamespace(done=False, of=self.name)
        self.cuda.notes.append(("record", self.name, self.cuda.here))
        return event

    def wait_event(self, event):
        self.cuda.notes.append(("wait", self.name, event.of))


class FakeCuda:
    """Recorded calls; the current device; a stream for each device."""

    class ManagedMemory:
        pass

    class DLPackMemory:
        pass

    class Memory:
        pass

    def __init__(self):
        self.notes, self.here, self.sides = [], 0, 0
        self.current = {d: FakeStream(self, f"compute {d}") for d in (0, 1)}

    def Device(self, number):
        @contextmanager
        def entered():
            before, self.here = self.here, number
            yield
            self.here = before

        class Entered:
            id = number

            def __enter__(inner):  # noqa: N805
                inner.context = entered()
                return inner.context.__enter__()

            def __exit__(inner, *error):  # noqa: N805
                return inner.context.__exit__(*error)

        return Entered()

    def get_current_stream(self, device):
        return self.current[device]

    def Stream(self, non_blocking):
        assert non_blocking  # otherwise it would wait for the default stream
        self.sides += 1
        return FakeStream(self, f"side {self.sides} of {self.here}")

    def malloc_managed(self, size):
        return self.ManagedMemory()


@pytest.fixture
def cuda(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(FakeArray, "cuda", cuda, raising=False)
    fake = SimpleNamespace(
        cuda=cuda,
        ndarray=FakeArray,
        empty=lambda shape, dtype: FakeArray(shape, dtype, cuda.Memory()),
        from_dlpack=lambda _: on(cuda, 1, cuda.DLPackMemory()),
        asarray=lambda host: FakeArray(host.shape, host.dtype, cuda.Memory()),
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return cuda


class Noting:
    def __init__(self):
        self.streams = []

    def launch(self, kernel, dtype, args, stream):
        self.streams.append(stream)


class Foreign:
    """A torch CUDA tensor, as far as DLPack needs one."""

    requires_grad = False

    def __dlpack__(self, **how):
        raise AssertionError("the stand-in takes it as it is")

    def __dlpack_device__(self):
        return 2, 1


def on(cuda, device, memory=None):
    with cuda.Device(device):
        return FakeArray((8,), "float32", memory or cuda.Memory())


def test_an_array_is_filled_on_its_own_device(cuda):
    CupyExecutor().full((8,), "float32", 0, 1)
    assert cuda.notes == [("fill", 1)]


def test_a_kernel_runs_on_the_stream_of_its_arrays_device(cuda):
    with driver.use(Noting()) as launcher:
        CupyExecutor().launch(FIRST_BAD, "float32", [on(cuda, 1), on(cuda, 1), 8, 0.0])
    assert launcher.streams == [cuda.current[1].ptr]


def test_pages_move_beside_the_kernels_and_leave_after_them(cuda, monkeypatch):
    moves = []
    monkeypatch.setattr(managed, "prefetch", lambda _, to, how: moves.append((to, how)))
    gpu, page = CupyExecutor(), on(cuda, 1)
    gpu.move(page, 1)
    assert cuda.notes == []
    gpu.arrived(1)
    assert cuda.notes == [
        ("record", "side 1 of 1", 1),
        ("wait", "compute 1", "side 1 of 1"),
    ]
    cuda.notes.clear()
    gpu.move(page, HOST)
    assert cuda.notes == [
        ("record", "compute 1", 1),
        ("wait", "side 2 of 1", "compute 1"),
    ]
    gpu.move(page, 1)
    sides = [hash(f"side {i} of 1") for i in (1, 2)]
    assert moves == [(1, sides[0]), (HOST, sides[1]), (1, sides[0])]


def test_what_another_library_may_free_is_kept_until_the_kernel_has_read_it(cuda):
    gpu, own = CupyExecutor(), on(cuda, 1)
    with driver.use(Noting()):
        theirs = gpu.adopt(Foreign())
        gpu.launch(FIRST_BAD, "float32", [theirs, own, 8, 0.0])
        ((event, kept),) = gpu._held
        assert kept == [theirs]
        assert event.of == "compute 1"
        gpu.launch(FIRST_BAD, "float32", [own, own, 8, 0.0])
        assert len(gpu._held) == 1
        event.done = True
        gpu.launch(FIRST_BAD, "float32", [own, own, 8, 0.0])
    assert gpu._held == []


@pytest.mark.parametrize("wanted", [np.zeros(3), torch.zeros(3), [1.0]])
def test_an_array_of_the_host_is_one_sentence(cuda, wanted):
    with pytest.raises(InputError, match=r"in host memory; move it to the GPU first"):
        CupyExecutor().adopt(wanted)


def test_a_parameter_is_one_sentence(cuda):
    parameter = Foreign()
    parameter.requires_grad = True
    with pytest.raises(InputError, match=r"requires grad, .* `tensor.detach\(\)`"):
        CupyExecutor().adopt(parameter)


@pytest.mark.parametrize("table", [double_quant._map, adamw._maps])
def test_a_table_is_uploaded_for_each_stream(cuda, table):
    gpu = CupyExecutor()
    first = table(gpu, 1, gpu.stream(1))
    assert table(gpu, 1, gpu.stream(1)) is first
    cuda.current[1] = FakeStream(cuda, "another")
    assert table(gpu, 1, gpu.stream(1)) is not first


def test_states_that_never_were_on_the_device(cuda, monkeypatch):
    told = []
    monkeypatch.setattr(managed, "check", lambda device: told.append(("check", device)))
    monkeypatch.setattr(managed, "settle", lambda array: told.append("settle"))
    monkeypatch.setattr(managed, "fill", lambda array, value: told.append(value))
    gpu = CupyExecutor()
    array = gpu.home((8,), "float32", 7, 1)
    assert told == [("check", 1), "settle", 7]
    assert array.device.id == 1
    assert gpu.managed(array) is array  # it is managed already


def test_a_device_that_cannot_page_is_refused_before_anything_is_allocated(
    cuda, monkeypatch
):
    def refuse(device):
        raise InputError("no")

    monkeypatch.setattr(managed, "check", refuse)
    monkeypatch.setattr(cuda, "malloc_managed", lambda _: pytest.fail("allocated"))
    for ask in (
        lambda gpu: gpu.home((8,), "float32", 0, 1),
        lambda gpu: gpu.managed(on(cuda, 1)),
    ):
        with pytest.raises(InputError, match="no"):
            ask(CupyExecutor())


def test_the_stand_ins_are_what_they_stand_for():
    assert isinstance(CupyExecutor.__new__(CupyExecutor), executor.Executor)
    cupy = pytest.importorskip("cupy")
    for name in ("ManagedMemory", "UnownedMemory", "get_current_stream", "Stream"):
        assert hasattr(cupy.cuda, name)
    memory = pytest.importorskip("cupy._core.dlpack")
    assert hasattr(memory, "DLPackMemory")
