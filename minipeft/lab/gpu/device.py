"""Time calls with CuPy's events on a GPU, or with a substitute in the tests."""

from collections.abc import Callable
from functools import cached_property
from statistics import median
from typing import Any, Protocol, runtime_checkable

import numpy as np

from minipeft.cupy.executor import missing, numpy_dtype
from minipeft.errors import InputError
from minipeft.lab.gpu.slots import SCHEDULERS

Call = Callable[[], object]

WARM_UPS, ROUNDS = 5, 50
# Read before every measured call: more than L2 holds, and enough for the host to have
# launched the call before the device has finished reading. Had it been written, L2
# would be full of lines that the measured call must first send to memory.
FLUSH = 512 * 2**20
FLUSHES = 4  # reads of it: one alone can end before the host has launched the call
CLOCK_RATE = 13  # cudaDevAttrClockRate: the highest clock, in kHz
METHOD = (
    f"Median of {ROUNDS} calls after {WARM_UPS}, each between two CUDA events. Before "
    "each, a buffer of at least 512 MB and four times L2 is read "
    f"{FLUSHES} times, so that no input "
    "lies in L2, and nothing there waits to be written."
)


@runtime_checkable
class Device(Protocol):
    """The functions of a device that the report needs."""

    place: str

    def facts(self) -> dict[str, str]:
        """Describe the device and the software that drives it."""

    def pace(self) -> tuple[str, float]:
        """Return the architecture, and the instructions of warps issued in a second."""

    def elapsed(self, call: Call) -> float:
        """Return the seconds that the device takes for a call, its caches cold."""

    def copying(self, size: int) -> Call:
        """Return a copy of `size` bytes from one place of the memory to another."""

    def multiplying(self, dtype: str, n: int) -> Call:
        """Return a product of two (n, n) matrices; the dtype may be `tf32`.

        Raises:
            InputError: if it cannot be had here, in half a sentence.
        """


def unmeasured(name: str) -> str | None:
    """Say in one sentence why no report is made on a device; None where it is.

    Args:
        name: of the device: `cpu`, `cuda` or `cuda:N`.
    """
    if not name.startswith("cuda"):
        return "no GPU, or --device cpu"
    if name not in ("cuda", "cuda:0"):
        number = name.removeprefix("cuda:")
        return (
            f"the report is of cuda:0, and {name} was chosen; CUDA_VISIBLE_DEVICES="
            f"{number} and --device cuda make it the first"
        )
    return missing()


def measure(device: Device, call: Call) -> float:
    """Return the median seconds of a call, after some that warm the device up."""
    for _ in range(WARM_UPS):
        call()
    return median(device.elapsed(call) for _ in range(ROUNDS))


class CupyDevice:
    """The first CUDA device, on its default stream, which torch uses too."""

    place = "cuda"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._properties = cupy.cuda.runtime.getDeviceProperties(0)
        self._flushed = max(FLUSH, 4 * self._properties["l2CacheSize"])

    @cached_property
    def _buffer(self) -> Any:  # as late as all that memory may be too little for
        return self._cupy.zeros(self._flushed // 4, "float32")

    @cached_property
    def _largest(self) -> Any:
        return self._cupy.zeros((), "float32")

    def facts(self) -> dict[str, str]:
        """Ask the runtime, the driver and the packages."""
        p, cuda = self._properties, self._cupy.cuda
        return {
            "name": p["name"].decode(),
            "compute capability": f"{p['major']}.{p['minor']}",
            "multiprocessors": str(p["multiProcessorCount"]),
            "memory": f"{p['totalGlobalMem'] / 1e9:.1f} GB",
            "L2": f"{p['l2CacheSize'] / 1e6:.1f} MB",
            "driver": f"for CUDA {_version(cuda.runtime.driverGetVersion())}",
            "CUDA runtime": _version(cuda.runtime.runtimeGetVersion()),
            "CuPy": self._cupy.__version__,
            "NVRTC": ".".join(map(str, cuda.nvrtc.getVersion())),
        }

    def pace(self) -> tuple[str, float]:
        """Ask for multiprocessors and clock: each of four schedulers issues one."""
        p = self._properties
        kilohertz = self._cupy.cuda.runtime.deviceGetAttribute(CLOCK_RATE, 0)
        each = p["multiProcessorCount"] * SCHEDULERS * kilohertz * 1e3
        return f"{p['major']}{p['minor']}", each

    def elapsed(self, call: Call) -> float:
        """Fill L2 with unused data, then time the call between two events."""
        cuda = self._cupy.cuda
        start, stop = cuda.Event(), cuda.Event()
        for _ in range(FLUSHES):
            self._buffer.max(out=self._largest)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(cuda.get_elapsed_time(start, stop)) / 1e3

    def copying(self, size: int) -> Call:
        """Let the driver copy."""
        source, target = (self._cupy.zeros(size, "uint8") for _ in range(2))
        return lambda: target.data.copy_from_device_async(source.data, size)

    def multiplying(self, dtype: str, n: int) -> Call:
        """Call cuBLAS, through torch where it has CUDA: CuPy's wheel brings none."""
        try:
            call = _torch_product(dtype, n) or self._cupy_product(dtype, n)
            call()
        except Exception as error:  # many types of error mean: not available
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(reason) from error
        return call

    def _cupy_product(self, dtype: str, n: int) -> Call:
        if dtype == "tf32":
            raise InputError("needs torch with CUDA")
        drawn = np.random.default_rng(0).standard_normal((n, n), np.float32)
        a = self._cupy.asarray(drawn.astype(numpy_dtype(dtype)))
        return lambda: self._cupy.matmul(a, a)


def _torch_product(dtype: str, n: int) -> Call | None:
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    kind: Any = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    a = torch.randn(n, n, device="cuda", dtype=kind)

    def call() -> None:
        precision = "high" if dtype == "tf32" else "highest"
        torch.set_float32_matmul_precision(precision)
        torch.mm(a, a)

    return call


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
