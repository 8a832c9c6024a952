"""CPU executors: the launchers of minipeft.cupy run on them unchanged.

Arrays are NumPy arrays. What is new from `empty` is filled with a pattern, so that a
value which a kernel forgets to write is not a lucky zero.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minipeft.cupy.executor import Facts
from minipeft.cupy.kernels import Kernel, source
from tests.cuda.toolchain import compile_cpu

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class LaunchError(Exception):
    """A launch that ended in something else than values: a race, a wild address, …"""


class NumpyExecutor:
    """All of an executor but the launch."""

    def adopt(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def facts(self, array: np.ndarray) -> Facts:
        contiguous = array.flags.c_contiguous
        address = array.__array_interface__["data"][0]
        return Facts(array.dtype.name, array.shape, contiguous, 0, address)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> np.ndarray:
        array = np.empty(shape, DTYPES.get(dtype, dtype))
        array.reshape(-1).view(np.uint8)[...] = 0xA5
        return array

    def upload(self, host: np.ndarray, device: int) -> np.ndarray:
        return np.array(host)

    def download(self, array: np.ndarray) -> np.ndarray:
        return np.array(array)

    def launch(
        self, kernel: Kernel, dtype: str, grid: int, args: Sequence[Any]
    ) -> None:
        raise NotImplementedError


class CpuExecutor(NumpyExecutor):
    """Runs what g++ made of the kernels, each launch in a process of its own."""

    def __init__(self, program: Path, variant: str = "source", seed: int = 0) -> None:
        self.program = program
        self.variant = variant
        self.seed = seed

    def launch(
        self, kernel: Kernel, dtype: str, grid: int, args: Sequence[Any]
    ) -> None:
        packed = [np.asarray(a) for a in kernel.pack(args)]
        message = [np.int64(len(packed)).tobytes()]
        for array, given in zip(packed, args, strict=True):
            sign = 1 if isinstance(given, np.ndarray) else -1
            message += [np.int64(sign * array.nbytes).tobytes(), array.tobytes()]
        name = f"{self.variant}:{kernel.expression(dtype)}"
        command = [self.program, name, grid, kernel.threads, self.seed]
        done = subprocess.run(
            [str(word) for word in command],
            input=b"".join(message),
            capture_output=True,
            env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0"},
        )
        if done.returncode:
            raise LaunchError(done.stderr.decode(errors="replace"))
        buffers = [a for a in args if isinstance(a, np.ndarray)]
        ends = np.cumsum([b.nbytes for b in buffers])
        for buffer, end in zip(buffers, ends, strict=True):
            part = done.stdout[end - buffer.nbytes : end]
            buffer.reshape(-1).view(np.uint8)[...] = np.frombuffer(part, np.uint8)


def on_cpu(row: str, flavour: str = "values", seed: int = 0) -> CpuExecutor:
    """Build a row's own source if needed, and run it."""
    program = compile_cpu(row, flavour, {"source": source(row)})
    return CpuExecutor(program, "source", seed)
