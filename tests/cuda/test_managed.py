"""The calls of CUDA for managed memory, with its functions replaced by recorders."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from minipeft.cupy import managed
from minipeft.errors import InputError

runtime = pytest.importorskip("cuda.bindings.runtime")
PLACE = runtime.cudaMemLocationType
ADVICE = runtime.cudaMemoryAdvise
OK = runtime.cudaError_t.cudaSuccess


def array(nbytes=4096, device=3):
    return SimpleNamespace(
        device=SimpleNamespace(id=device),
        nbytes=nbytes,
        data=SimpleNamespace(ptr=0x7000),
    )


@pytest.fixture(autouse=True)
def _devices(monkeypatch):
    """Let all devices but number 9 take hints."""
    concurrent = runtime.cudaDeviceAttr.cudaDevAttrConcurrentManagedAccess

    def attribute(which, device):
        assert which == concurrent
        return OK, int(device != 9)

    monkeypatch.setattr(runtime, "cudaDeviceGetAttribute", attribute)
    managed.concurrent.cache_clear()
    yield
    managed.concurrent.cache_clear()


def test_what_a_device_is_asked_is_asked_once(monkeypatch):
    assert managed.concurrent(3)
    assert not managed.concurrent(9)
    monkeypatch.delattr(runtime, "cudaDeviceGetAttribute")
    assert managed.concurrent(3)


@pytest.fixture
def told(monkeypatch):
    calls = []

    def advise(address, size, hint, place):
        calls.append((address, size, hint, place.type, place.id))
        return (OK,)

    def prefetch(address, size, place, flags, stream):
        calls.append((address, size, place.type, place.id, flags, stream))
        return (OK,)

    monkeypatch.setattr(runtime, "cudaMemAdvise", advise)
    monkeypatch.setattr(runtime, "cudaMemPrefetchAsync", prefetch)
    return calls


def test_home_is_the_host_and_the_device_reaches_it(told):
    """The driver refuses device -1 as a name of the host."""
    managed.settle(array())
    preferred, reached = (
        ADVICE.cudaMemAdviseSetPreferredLocation,
        ADVICE.cudaMemAdviseSetAccessedBy,
    )
    assert told == [
        (0x7000, 4096, preferred, PLACE.cudaMemLocationTypeHost, 0),
        (0x7000, 4096, reached, PLACE.cudaMemLocationTypeDevice, 3),
    ]


@pytest.mark.parametrize(
    ("device", "place"),
    [
        (2, (PLACE.cudaMemLocationTypeDevice, 2)),
        (managed.HOST, (PLACE.cudaMemLocationTypeHost, 0)),
    ],
)
def test_an_array_moves_on_its_stream(told, device, place):
    managed.prefetch(array(), device, 77)
    assert told == [(0x7000, 4096, *place, 0, 77)]


def test_nothing_is_said_of_nothing(told):
    managed.settle(array(nbytes=0))
    managed.prefetch(array(nbytes=0), 0, 0)
    assert told == []


def test_a_device_that_cannot_page_is_refused():
    managed.check(3)
    with pytest.raises(InputError, match="device 9 cannot page: under Windows and WSL"):
        managed.check(9)


def test_under_cuda_12_the_functions_that_know_the_host_are_called(told, monkeypatch):
    """There the plain functions take a device number, in version 13 a location."""
    for name in ("cudaMemAdvise", "cudaMemPrefetchAsync"):
        new = getattr(runtime, name)
        monkeypatch.setattr(runtime, f"{name}_v2", new, raising=False)
        monkeypatch.setattr(runtime, name, lambda *_: pytest.fail("an old signature"))
    managed.settle(array())
    managed.prefetch(array(), managed.HOST, 77)
    assert [call[:2] for call in told] == [(0x7000, 4096)] * 3
    assert told[-1][2:] == (PLACE.cudaMemLocationTypeHost, 0, 0, 77)


@pytest.mark.parametrize(("dtype", "value"), [("uint8", 127), ("float32", 0)])
def test_an_array_is_filled_from_the_host(dtype, value):
    here = np.full(100, 3, dtype)
    there = SimpleNamespace(
        nbytes=here.nbytes, dtype=here.dtype, data=SimpleNamespace(ptr=here.ctypes.data)
    )
    managed.fill(there, value)
    assert (here == value).all()


def test_what_cuda_refuses_is_said(monkeypatch):
    error = runtime.cudaError_t.cudaErrorInvalidDevice
    monkeypatch.setattr(runtime, "cudaMemPrefetchAsync", lambda *_: (error,))
    with pytest.raises(RuntimeError, match=r"^CUDA: invalid device ordinal$"):
        managed.prefetch(array(), 9, 0)


def test_without_the_bindings_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(InputError, match=r"`pip install '..cupy.'`"):
        managed.settle(array())
