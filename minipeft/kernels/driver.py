"""Launch a kernel by NVIDIA's driver: addresses, scalars and the handle of a stream.

The caller keeps the arrays alive until the stream has finished the launch.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from minipeft.kernels import POINTER, Kernel
from minipeft.kernels.checks import Facts
from minipeft.kernels.compiler import compile_row

CTYPES = {
    POINTER: ctypes.c_void_p,
    "uint64": ctypes.c_uint64,
    "int64": ctypes.c_int64,
    "int32": ctypes.c_int32,
    "float32": ctypes.c_float,
}

# An argument: the facts of an array, a null pointer, or a scalar.
Argument = Facts | None | int | float | np.generic


@runtime_checkable
class Launcher(Protocol):
    """An object that runs kernels: a device, or a CPU in the tests."""

    def launch(
        self, kernel: Kernel, dtype: str, args: Sequence[Argument], stream: int
    ) -> None:
        """Run the kernel's instance for `dtype` after earlier work of the stream."""


class Driver:
    """The device on which the arrays lie."""

    def launch(
        self, kernel: Kernel, dtype: str, args: Sequence[Argument], stream: int
    ) -> None:
        """Compile the file once per process, then launch; skip an empty grid."""
        grid = kernel.grid(args, dtype)
        if grid == 0:  # an empty tensor; CUDA refuses it
            return
        device = next(a.device for a in args if isinstance(a, Facts))
        function = _function(kernel.row, kernel.expression(dtype), architecture(device))
        kinds = tuple(CTYPES[kind] for kind in kernel.arguments.values())
        values = tuple(map(_value, kernel.pack(args)))
        shape = (grid, 1, 1, kernel.threads, 1, 1)
        with _on(device):
            answer = _cuda().cuLaunchKernel(
                function, *shape, 0, stream, (values, kinds), 0
            )
        call(answer)


def launch(kernel: Kernel, dtype: str, args: Sequence[Argument], stream: int) -> None:
    """Launch on the device of the arrays, or on the launcher that a test has set.

    Args:
        kernel: from the table.
        dtype: of its instance.
        args: in the order of the table.
        stream: its handle; 0 is the default stream of the device.
    """
    _launchers[-1].launch(kernel, dtype, args, stream)


@contextmanager
def use(launcher: Launcher) -> Iterator[Launcher]:
    """Launch on another launcher inside a `with` block."""
    _launchers.append(launcher)  # for all threads: backward runs in a thread of its own
    try:
        yield launcher
    finally:
        _launchers.remove(launcher)


@cache
def architecture(device: int) -> str:
    """Return the architecture of a device, such as "90"."""
    cuda = _cuda()
    call(cuda.cuInit(0))
    kind = cuda.CUdevice_attribute
    major, minor = (
        call(cuda.cuDeviceGetAttribute(which, device))[0]
        for which in (
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return f"{major}{minor}"


def call(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the results of a driver function, after checking its status.

    Raises:
        RuntimeError: with the driver's message, if the status is an error.
    """
    status, *results = answer
    cuda = _cuda()
    if status != cuda.CUresult.CUDA_SUCCESS:
        _, text = cuda.cuGetErrorString(status)
        raise RuntimeError(f"CUDA: {text.decode()}")
    return tuple(results)


@contextmanager
def _on(device: int) -> Iterator[None]:
    # A thread that has not used CUDA, such as one of autograd, has no current device.
    call(_cuda().cuCtxPushCurrent(_context(device)))
    try:
        yield
    finally:
        call(_cuda().cuCtxPopCurrent())


@cache
def _context(device: int) -> Any:  # the context that CuPy and torch use too
    (context,) = call(_cuda().cuDevicePrimaryCtxRetain(device))
    return context


@cache
def _library(row: str, architecture: str) -> tuple[Any, dict[str, str]]:
    # A library belongs to no device: each device loads its code at the first launch.
    compiled = compile_row(row, architecture)
    image = compiled.image
    (library,) = call(_cuda().cuLibraryLoadData(image, [], [], 0, [], [], 0))
    return library, compiled.names


@cache
def _function(row: str, expression: str, architecture: str) -> Any:
    cuda = _cuda()
    library, names = _library(row, architecture)
    (kernel,) = call(cuda.cuLibraryGetKernel(library, names[expression].encode()))
    return cuda.CUfunction(int(kernel))  # the driver can launch both types


def _value(argument: Any) -> Any:
    return argument.address if isinstance(argument, Facts) else argument.item()


def _cuda() -> Any:
    from cuda.bindings import driver

    return driver


_launchers: list[Launcher] = [Driver()]
