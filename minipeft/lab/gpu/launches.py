"""Record the launches that a launcher makes, to repeat and time them.

A launcher checks, allocates, launches a kernel and waits. Only the launch of the kernel
is timed, with the arguments of the launcher.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipeft.cupy.executor import Array, Executor, current
from minipeft.kernels import POINTER, Kernel
from minipeft.kernels.checks import Facts


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, its arguments under the names of the table."""

    kernel: Kernel
    dtype: str
    arguments: Mapping[str, Any]
    again: Callable[[], None]

    def in_a_row(self, layers: int) -> Callable[[], None]:
        """Return as many launches, each on arrays of its own, one after another."""
        gpu = current()
        packs = [list(self.arguments.values())]
        for _ in range(layers - 1):
            packs.append([_copied(gpu, a, self) for a in self.arguments.items()])

        def all_of_them() -> None:
            for arguments in packs:
                gpu.launch(self.kernel, self.dtype, arguments)

        return all_of_them

    @property
    def bytes_moved(self) -> int:
        """Count every array once: the bytes that a kernel must move at least."""
        kinds = self.kernel.arguments
        arrays = [a for name, a in self.arguments.items() if kinds[name] == POINTER]
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def operations(self) -> float:
        """Count as the head of the kernel's file does."""
        return OPERATIONS[self.kernel.template](self.arguments)


def _copied(gpu: Executor, argument: tuple[str, Any], launch: Launch) -> Any:
    name, value = argument
    if launch.kernel.arguments[name] != POINTER or value is None:
        return value
    return gpu.upload(gpu.download(value), gpu.facts(value).device)


def _product(a: Mapping[str, Any]) -> float:
    # Of a weight: shift, mask and product once, then a product and a sum for each row.
    weights = a["in_features"] * a["out_features"]
    update = 2 * a["tokens"] * a["out_features"] * a["r"]
    return weights * (3 + 2 * a["tokens"]) + update


def _norms(a: Mapping[str, Any]) -> float:
    return float((2 * a["r"] + 3) * a["in_features"] * a["out_features"])


# A fused multiply-add is two operations.
OPERATIONS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "quantize": lambda a: 6 * a["n"],
    "dequantize": lambda a: a["n"],
    "nest": lambda a: 12 * a["n"],
    "dequantize_nested": lambda a: 1.25 * a["n"],
    "adamw": lambda a: 14 * a["n"],
    "adamw_8bit": lambda a: 30 * a["n"],
    "first_bad": lambda a: a["n"],
    "shrink": lambda a: 2 * a["tokens"] * a["r"] * a["in_features"],
    "expand": lambda a: 2 * a["tokens"] * a["r"] * a["out_features"],
    "product": _product,
    "product_nested": _product,
    "row_norm": _norms,
    "row_norm_mixed": _norms,
}


class Recorder:
    """An executor that calls another one and records the launches."""

    def __init__(self, gpu: Executor) -> None:
        self._gpu = gpu
        self._noted: list[Launch] = []

    def __hash__(self) -> int:
        """Be a key, as every executor."""
        return id(self)

    def forget(self) -> None:
        """Delete all records, for example after a trial that failed."""
        self._noted.clear()

    def take(self, kernel: Kernel) -> Launch:
        """Return the only launch of a kernel, and delete all records."""
        found = [launch for launch in self._noted if launch.kernel is kernel]
        self.forget()
        (launch,) = found
        return launch

    def launch(self, kernel: Kernel, dtype: str, args: Sequence[Any]) -> None:
        """Launch the kernel and record the launch."""

        def again() -> None:
            self._gpu.launch(kernel, dtype, args)

        named = dict(zip(kernel.arguments, args, strict=True))
        self._noted.append(Launch(kernel, dtype, named, again))
        again()

    def adopt(self, array: Any) -> Array:
        """Call the executor."""
        return self._gpu.adopt(array)

    def facts(self, array: Array) -> Facts:
        """Call the executor."""
        return self._gpu.facts(array)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int) -> Array:
        """Call the executor."""
        return self._gpu.empty(shape, dtype, device)

    def full(
        self, shape: tuple[int, ...], dtype: str, value: int, device: int
    ) -> Array:
        """Call the executor."""
        return self._gpu.full(shape, dtype, value, device)

    def upload(self, host: np.ndarray, device: int) -> Array:
        """Call the executor."""
        return self._gpu.upload(host, device)

    def download(self, array: Array) -> np.ndarray:
        """Call the executor."""
        return self._gpu.download(array)

    def stream(self, device: int) -> int:
        """Call the executor."""
        return self._gpu.stream(device)

    def home(
        self, shape: tuple[int, ...], dtype: str, value: int, device: int
    ) -> Array:
        """Call the executor."""
        return self._gpu.home(shape, dtype, value, device)

    def managed(self, array: Array) -> Array:
        """Call the executor."""
        return self._gpu.managed(array)

    def move(self, array: Array, device: int) -> None:
        """Call the executor."""
        self._gpu.move(array, device)

    def arrived(self, device: int) -> None:
        """Call the executor."""
        self._gpu.arrived(device)
