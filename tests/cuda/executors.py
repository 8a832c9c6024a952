"""Executors without a GPU, for `minipeft.kernels.driver.use`.

A launcher gets addresses. `NumpyExecutor` runs the CuPy column on a launcher, with
NumPy arrays. A new array from `empty` is filled with a pattern, so that a value which a
kernel does not write is visibly wrong.
"""

import atexit
import contextlib
import ctypes
import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from minipeft.cupy import executor
from minipeft.kernels import Kernel, driver, source
from minipeft.kernels.checks import Facts
from tests.cuda import ptx, ptx_parser
from tests.cuda.toolchain import ARCHITECTURES, compile_cpu, compile_device

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


# Before the number of a buffer: the argument is the same buffer again.
SAME_AS = -(2**62)


class LaunchError(Exception):
    """A launch failed: a race, a wild address, or another error instead of values."""


def memory(facts: Facts) -> np.ndarray:
    """Return the bytes of an array in host memory."""
    if not facts.nbytes:
        return np.zeros(0, np.uint8)
    kind = ctypes.c_uint8 * facts.nbytes
    return np.ctypeslib.as_array(kind.from_address(facts.address))


def opened(args: Sequence[Any]) -> list[Any]:
    """Replace the facts of each array by its bytes."""
    return [memory(a) if isinstance(a, Facts) else a for a in args]


class NumpyExecutor:
    """The CuPy column's executor, on NumPy arrays."""

    def __init__(self, launcher: driver.Launcher) -> None:
        self.launcher = launcher

    def adopt(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def facts(self, array: np.ndarray) -> Facts:
        contiguous = array.flags.c_contiguous
        address = array.__array_interface__["data"][0]
        return Facts(
            array.dtype.name, array.shape, contiguous, 0, address, array.itemsize
        )

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> np.ndarray:
        array = np.empty(shape, DTYPES.get(dtype, dtype))
        array.reshape(-1).view(np.uint8)[...] = 0xA5
        return array

    def full(
        self, shape: tuple[int, ...], dtype: str, value: int, device: int
    ) -> np.ndarray:
        return np.full(shape, value, DTYPES.get(dtype, dtype))

    def upload(self, host: np.ndarray, device: int) -> np.ndarray:
        return np.array(host)

    def download(self, array: np.ndarray) -> np.ndarray:
        return np.array(array)

    def stream(self, device: int) -> int:
        return 0

    def home(
        self, shape: tuple[int, ...], dtype: str, value: int, device: int
    ) -> np.ndarray:
        return self.full(shape, dtype, value, device)

    def managed(self, array: np.ndarray) -> np.ndarray:
        return np.array(array)

    def move(self, array: np.ndarray, device: int) -> None:
        """Do nothing: there is one memory; the tests look at the counts of pages."""

    def arrived(self, device: int) -> None:
        """Do nothing: there is one memory."""

    def launch(self, kernel: Kernel, dtype: str, args: Sequence[Any]) -> None:
        facts = [self.facts(a) if isinstance(a, np.ndarray) else a for a in args]
        self.launcher.launch(kernel, dtype, facts, 0)


class Runner:
    """A process of runner.cpp that runs one launch after another."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0"},
        )
        atexit.register(self.close)

    def run(self, message: list[bytes], expected: int) -> bytes:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"".join(message))
            self._process.stdin.flush()
        answer = self._process.stdout.read(expected)
        if len(answer) < expected:
            raise LaunchError(self.close())
        return answer

    def close(self) -> str:
        """End the process; return what it wrote to stderr."""
        atexit.unregister(self.close)
        _, complaints = self._process.communicate()
        return complaints.decode(errors="replace")


def encode(arguments: list[Any]) -> tuple[list[bytes], list[np.ndarray]]:
    """Write arguments as runner.cpp reads them; return the buffers that it returns."""
    message: list[bytes] = []
    buffers: list[np.ndarray] = []
    for argument in arguments:
        known = None
        if not isinstance(argument, np.ndarray):
            length = -argument.nbytes
        elif (known := ptx.position(argument, buffers)) is None:
            length = argument.nbytes
            buffers.append(argument)
        else:  # an output that is also an input
            length = SAME_AS + known
        message.append(np.int64(length).tobytes())
        message.append(b"" if known is not None else argument.tobytes())
    return message, buffers


class CpuLauncher:
    """Runs the kernels that g++ compiled for this CPU.

    Args:
        flavour: a way to build, from `toolchain.FLAVOURS`.
        seed: of the order of threads and blocks.
        mutants: for some rows, a program and the variant to run.
    """

    _running: ClassVar[dict[Path, Runner]] = {}

    def __init__(
        self,
        flavour: str = "values",
        seed: int = 0,
        mutants: Mapping[str, tuple[Path, str]] = MappingProxyType({}),
    ) -> None:
        self.flavour = flavour
        self.seed = seed
        self.mutants = mutants

    def _program(self, row: str) -> tuple[Path, str]:
        if row in self.mutants:
            return self.mutants[row]
        return compile_cpu(row, self.flavour, {"source": source(row)}), "source"

    def launch(
        self, kernel: Kernel, dtype: str, args: Sequence[Any], stream: int
    ) -> None:
        path, variant = self._program(kernel.row)
        name = f"{variant}:{kernel.expression(dtype)}".encode()
        grid = kernel.grid(args, dtype)
        header = [len(name), grid, kernel.threads, self.seed, len(args)]
        arguments, buffers = encode(kernel.pack(opened(args)))
        message = [np.array(header, np.int64).tobytes(), name, *arguments]
        if path not in self._running:
            self._running[path] = Runner(path)
        program = self._running[path]
        try:
            answer = program.run(message, sum(b.nbytes for b in buffers))
        except LaunchError:
            del self._running[path]
            raise
        start = 0
        for buffer in buffers:
            buffer[...] = np.frombuffer(answer, np.uint8, buffer.nbytes, start)
            start += buffer.nbytes


class CpuExecutor(NumpyExecutor):
    """The CuPy column on `CpuLauncher`, whose arguments it takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(CpuLauncher(*args, **kwargs))


class DeviceLauncher:
    """Runs the kernels on a GPU, with arrays in host memory: for the same cases."""

    def launch(
        self, kernel: Kernel, dtype: str, args: Sequence[Any], stream: int
    ) -> None:
        gpu = executor.CupyExecutor()
        buffers: list[np.ndarray] = []
        on_device: list[Any] = []
        arguments = []
        for argument in opened(args):
            if isinstance(argument, np.ndarray):
                known = ptx.position(argument, buffers)
                if known is None:
                    known = len(buffers)
                    buffers.append(argument)
                    on_device.append(gpu.upload(argument, 0))
                argument = on_device[known]
            arguments.append(argument)
        gpu.launch(kernel, dtype, arguments)
        for buffer, result in zip(buffers, on_device, strict=True):
            buffer[...] = gpu.download(result)


class DeviceExecutor(NumpyExecutor):
    """The CuPy column on `DeviceLauncher`."""

    def __init__(self) -> None:
        super().__init__(DeviceLauncher())


class PtxLauncher:
    """Interprets the PTX that NVRTC compiled from the kernels.

    Args:
        architecture: of the GPU that NVRTC compiles for, such as "75".
        mutants: for some rows, another source.
    """

    def __init__(
        self,
        architecture: str = ARCHITECTURES[0],
        mutants: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.architecture = architecture
        self.mutants = mutants

    def launch(
        self, kernel: Kernel, dtype: str, args: Sequence[Any], stream: int
    ) -> None:
        where = (kernel.row, "ptx", self.architecture)
        if kernel.row in self.mutants:  # only the instance of this dtype
            compiled = compile_device(*where, self.mutants[kernel.row], [dtype])
        else:
            compiled = compile_device(*where, source(kernel.row))
        entry = _entries(compiled.image)[compiled.names[kernel.expression(dtype)]]
        grid = kernel.grid(args, dtype)
        ptx.launch(entry, grid, kernel.threads, kernel.pack(opened(args)))


class PtxExecutor(NumpyExecutor):
    """The CuPy column on `PtxLauncher`, whose arguments it takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(PtxLauncher(*args, **kwargs))


@cache
def _entries(image: Path) -> dict[str, ptx_parser.Entry]:
    return ptx_parser.parse(image.read_text())
