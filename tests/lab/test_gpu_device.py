"""The clock of `minipeft gpu-report`: its calls of CuPy and torch, and their order."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from minipeft.errors import InputError
from minipeft.lab.gpu import device


class FakeCupy:
    """Records the calls of those CuPy functions that `CupyDevice` uses."""

    def __init__(self):
        self.calls = calls = []

        class Event:
            def record(self):
                calls.append("record")

            def synchronize(self):
                calls.append("wait")

        properties = {
            "name": b"X",
            "major": 9,
            "minor": 0,
            "multiProcessorCount": 132,
            "totalGlobalMem": 80 * 10**9,
            "l2CacheSize": 200 * 2**20,
        }
        self.__version__ = "14"
        self.cuda = SimpleNamespace(
            Event=Event,
            get_elapsed_time=lambda start, stop: 2.5,
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
            runtime=SimpleNamespace(
                getDeviceProperties=lambda _: properties,
                driverGetVersion=lambda: 13020,
                runtimeGetVersion=lambda: 12090,
                deviceGetAttribute=lambda which, _: {13: 1_980_000}[which],
            ),
        )

    def zeros(self, size, dtype):
        def largest(out):
            self.flushed = size * np.dtype(dtype).itemsize
            self.calls.append("read")

        def copy_from_device_async(source, size):
            self.calls.append(("copy", source, size))

        data = SimpleNamespace(copy_from_device_async=copy_from_device_async)
        return SimpleNamespace(data=data, max=largest)

    def asarray(self, array):
        return array

    def matmul(self, a, b):
        self.calls.append(f"{a.dtype} product")


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setitem(sys.modules, "torch", None)
    return fake


def test_a_call_is_timed_between_two_events_with_a_cold_cache(cupy):
    gpu = device.CupyDevice()
    assert gpu.elapsed(lambda: cupy.calls.append("call")) == 2.5e-3
    assert cupy.calls == ["read"] * 4 + ["record", "call", "record", "wait"]
    assert cupy.flushed == 4 * 200 * 2**20


def test_a_scheduler_issues_an_instruction_a_cycle(cupy):
    assert device.CupyDevice().pace() == ("90", 132 * 4 * 1.98e9)


def test_the_facts_name_device_and_software(cupy):
    assert device.CupyDevice().facts() == {
        "name": "X",
        "compute capability": "9.0",
        "multiprocessors": "132",
        "memory": "80.0 GB",
        "L2": "209.7 MB",
        "driver": "for CUDA 13.2",
        "CUDA runtime": "12.9",
        "CuPy": "14",
        "NVRTC": "13.0",
    }


def test_a_copy_goes_from_one_array_to_another(cupy):
    device.CupyDevice().copying(4096)()
    ((what, source, size),) = cupy.calls
    assert (what, size) == ("copy", 4096)
    assert source.copy_from_device_async


def test_only_tf32_rounds_the_factors_of_a_float32_product(monkeypatch):
    torch = pytest.importorskip("torch")
    randn = torch.randn
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *n, device, dtype: randn(*n).to(dtype))
    for dtype, precision in (("tf32", "high"), ("float32", "highest")):
        device._torch_product(dtype, 4)()
        assert torch.get_float32_matmul_precision() == precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device._torch_product("float32", 4) is None


def test_a_product_without_torch_is_cupys_or_a_reason(cupy, monkeypatch):
    gpu = device.CupyDevice()
    gpu.multiplying("float16", 4)()
    assert cupy.calls == ["float16 product"] * 2  # a first run, untimed
    with pytest.raises(InputError, match=r"^needs torch with CUDA$"):
        gpu.multiplying("tf32", 4)

    def absent(*_):
        raise RuntimeError("libcublas.so.13 not found\nmore")

    monkeypatch.setattr(cupy, "matmul", absent)
    with pytest.raises(InputError, match=r"^libcublas.so.13 not found$"):
        gpu.multiplying("float32", 4)


def test_what_is_asked_of_cupy_is_there():
    """The names exist, at least; they can be looked up without a GPU."""
    cupy = pytest.importorskip("cupy")
    cuda = cupy.cuda
    assert {"record", "synchronize"} <= set(dir(cuda.Event))
    assert callable(cuda.get_elapsed_time)
    assert callable(cuda.MemoryPointer.copy_from_device_async)
    assert callable(cupy.ndarray.max)
    asked = ("getDeviceProperties", "driverGetVersion", "runtimeGetVersion")
    assert all(callable(getattr(cuda.runtime, name)) for name in asked)
    assert device._version(cuda.runtime.runtimeGetVersion()).count(".") == 1


def test_a_report_is_of_the_first_device_and_says_so(monkeypatch):
    monkeypatch.setattr(device, "missing", lambda: None)
    assert device.unmeasured("cuda") is device.unmeasured("cuda:0") is None
    said = "CUDA_VISIBLE_DEVICES=2 and --device cuda make it the first"
    assert device.unmeasured("cuda:2").endswith(said)
    assert device.unmeasured("cpu") == "no GPU, or --device cpu"
    monkeypatch.setattr(device, "missing", lambda: "CuPy is not installed")
    assert device.unmeasured("cuda") == "CuPy is not installed"
