"""Run kernels: with CuPy on a CUDA device, or on a CPU in the tests.

A launcher uses `current()` for arrays, facts about them, and launches, and never CuPy
itself. So the tests on a CPU run the same launchers as a GPU does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np

from minipeft.cupy import managed
from minipeft.errors import InputError
from minipeft.kernels import Kernel, compiler, driver
from minipeft.kernels.checks import Facts

HOST = managed.HOST

FOREIGN = {"DLPackMemory", "UnownedMemory"}
"""CuPy's classes of memory that another library may free."""

# An array of the executor: `cupy.ndarray` on a device.
Array = Any


@runtime_checkable
class Executor(Protocol):
    """The functions that a launcher calls."""

    def __hash__(self) -> int:
        """Make an executor a key: uploaded tables are stored for each executor."""

    def adopt(self, array: Any) -> Array:
        """Take an array, or any tensor with DLPack, without copying it."""

    def facts(self, array: Array) -> Facts:
        """Describe an adopted array."""

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Array:
        """Allocate, aligned to 16 bytes or better."""

    def full(
        self, shape: tuple[int, ...], dtype: str, value: int, device: int
    ) -> Array:
        """Allocate as `empty` does, and fill."""

    def upload(self, host: np.ndarray, device: int) -> Array:
        """Copy a NumPy array to the device."""

    def download(self, array: Array) -> np.ndarray:
        """Copy to NumPy; waits for the kernels before it."""

    def stream(self, device: int) -> int:
        """Return the handle of the stream on which kernels of a device run."""

    def home(
        self, shape: tuple[int, ...], dtype: str, value: int, device: int
    ) -> Array:
        """Allocate and fill memory on the host that the device can access too."""

    def managed(self, array: Array) -> Array:
        """Return a copy of an array in such memory, or the array if it is there."""

    def move(self, array: Array, device: int) -> None:
        """Start moving such memory to a device, or to the host (`HOST`)."""

    def arrived(self, device: int) -> None:
        """Make later kernels wait for all memory that moves to their device."""

    def launch(self, kernel: Kernel, dtype: str, args: Sequence[Any]) -> None:
        """Run the kernel's instance for `dtype`."""


class CupyExecutor:
    """Runs kernels on the current stream of the device that holds their arrays."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._sides: dict[tuple[int, int], Any] = {}
        self._held: list[tuple[Any, list[Array]]] = []

    def adopt(self, array: Any) -> Array:
        """Take a CuPy array as it is, a torch CUDA tensor through DLPack."""
        if isinstance(array, self._cupy.ndarray):
            return array
        if not _is_on_a_gpu(array):
            raise InputError(
                f"got a {type(array).__name__} in host memory; move it to the GPU "
                "first, with `cupy.asarray(W)` or `tensor.cuda()`."
            )
        if getattr(array, "requires_grad", False):
            raise InputError(
                "got a tensor that requires grad, and these kernels have no backward: "
                "pass `tensor.detach()`, or use minipeft.torch."
            )
        return self._cupy.from_dlpack(array)

    def facts(self, array: Array) -> Facts:
        """Describe a CuPy array."""
        return Facts(
            array.dtype.name,
            array.shape,
            array.flags.c_contiguous,
            array.device.id,
            array.data.ptr,
            array.itemsize,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Array:
        """Allocate from CuPy's pool, which aligns to 512 bytes."""
        with self._cupy.cuda.Device(device):
            return self._cupy.empty(shape, numpy_dtype(dtype))

    def full(
        self, shape: tuple[int, ...], dtype: str, value: int, device: int
    ) -> Array:
        """Allocate from CuPy's pool, and fill on the device."""
        array = self.empty(shape, dtype, device)
        with array.device:
            array.fill(value)
        return array

    def upload(self, host: np.ndarray, device: int) -> Array:
        """Copy a NumPy array to the device."""
        with self._cupy.cuda.Device(device):
            return self._cupy.asarray(host)

    def download(self, array: Array) -> np.ndarray:
        """Copy to NumPy on the current stream, and wait for it."""
        with array.device:
            return self._cupy.asnumpy(array)

    def stream(self, device: int) -> int:
        """Return CuPy's current stream on that device."""
        handle: int = self._stream(device).ptr
        return handle

    def home(
        self, shape: tuple[int, ...], dtype: str, value: int, device: int
    ) -> Array:
        """Allocate managed memory and fill it from the host."""
        managed.check(device)
        kind = numpy_dtype(dtype)
        with self._cupy.cuda.Device(device):
            size = prod(shape) * kind.itemsize
            memory = self._cupy.cuda.malloc_managed(size)
            array = self._cupy.ndarray(shape, kind, memory)
        managed.settle(array)
        managed.fill(array, value)
        return array

    def managed(self, array: Array) -> Array:
        """Copy into managed memory whose home is the host."""
        cupy = self._cupy
        managed.check(array.device.id)
        if isinstance(array.data.mem, cupy.cuda.ManagedMemory):
            return array
        with array.device:
            memory = cupy.cuda.malloc_managed(array.nbytes)
            copy = cupy.ndarray(array.shape, array.dtype, memory)
            copy[...] = array
        managed.settle(copy)
        return copy

    def move(self, array: Array, device: int) -> None:
        """Prefetch while kernels run; memory leaves a device after earlier kernels."""
        here = array.device.id
        side = self._side(here, device)
        if device == HOST:
            with array.device:
                side.wait_event(self._stream(here).record())
        managed.prefetch(array, device, side.ptr)

    def arrived(self, device: int) -> None:
        """Make the stream of the kernels wait; the host does not wait."""
        with self._cupy.cuda.Device(device):
            self._stream(device).wait_event(self._side(device, device).record())

    def launch(self, kernel: Kernel, dtype: str, args: Sequence[Any]) -> None:
        """Launch on the current stream of the device that holds the arrays."""
        arrays = [a for a in args if isinstance(a, self._cupy.ndarray)]
        facts = [
            self.facts(a) if isinstance(a, self._cupy.ndarray) else a for a in args
        ]
        device = arrays[0].device
        driver.launch(kernel, dtype, facts, self.stream(device.id))
        self._hold([a for a in arrays if self._is_foreign(a)], device)

    def _stream(self, device: int) -> Any:
        return self._cupy.cuda.get_current_stream(device)

    def _side(self, device: int, target: int) -> Any:
        # One stream for each direction, so that neither waits for the other.
        if (device, target) not in self._sides:
            with self._cupy.cuda.Device(device):
                self._sides[device, target] = self._cupy.cuda.Stream(non_blocking=True)
        return self._sides[device, target]

    def _is_foreign(self, array: Array) -> bool:
        # By name: CuPy's class for memory that came through DLPack is private.
        return any(kind.__name__ in FOREIGN for kind in type(array.data.mem).__mro__)

    def _hold(self, arrays: list[Array], device: Any) -> None:
        """Keep another library's memory alive until the kernel has read it.

        The allocator of that library does not know this stream.
        """
        self._held = [(event, kept) for event, kept in self._held if not event.done]
        if arrays:
            with device:
                self._held.append((self._stream(device.id).record(), arrays))


def _is_on_a_gpu(array: Any) -> bool:
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack_device__"):
        return False
    kind, _ = array.__dlpack_device__()
    return int(kind) in (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name from `kernels.CTYPES` or from NumPy."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise InputError(
            "NumPy and CuPy have no bfloat16 of their own: `pip install ml-dtypes`."
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def missing() -> str | None:
    """Say in one sentence why kernels cannot run here; None where they can."""
    try:
        import cupy
    except ImportError:
        return (
            "CuPy is not installed: run `pip install '.[cupy]'` in the clone of "
            "minipeft, or use minipeft.torch, which needs no CuPy."
        )
    if not cupy.cuda.is_available():
        return (
            "CuPy finds no CUDA device: install or update the NVIDIA driver, or use "
            "minipeft.torch, which runs on a CPU too."
        )
    return compiler.missing()


_current: ContextVar[Executor | None] = ContextVar("executor", default=None)


def current() -> Executor:
    """Return the executor in use; without a GPU, raise an error.

    Raises:
        InputError: the sentence of `missing`.
    """
    chosen = _current.get()
    return chosen if chosen is not None else _device()


@cache
def _device() -> Executor:
    reason = missing()
    if reason:
        raise InputError(reason)
    return CupyExecutor()


@contextmanager
def use(executor: Executor) -> Iterator[Executor]:
    """Run kernels on another executor inside a `with` block."""
    token = _current.set(executor)
    try:
        yield executor
    finally:
        _current.reset(token)
