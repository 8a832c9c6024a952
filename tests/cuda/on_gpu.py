"""Every row's small cases on the device, for a sanitizer to watch.

python -m tests.cuda.on_gpu     started by tools/gpu.py, under compute-sanitizer
"""

import sys

from minipeft.cupy.executor import missing, use
from minipeft.kernels import CTYPES
from tests.cuda.executors import DeviceExecutor
from tests.cuda.rows import ROWS


def small() -> None:
    """Launch every kernel a few times, each array in an allocation of its own."""
    import cupy

    cupy.cuda.set_allocator(None)  # a pool would hide an overrun into a neighbour
    with use(DeviceExecutor()):
        for row in ROWS.values():
            row.small(CTYPES)


def main() -> int:
    """Return 0; return 1 without a GPU, because the caller found one a moment ago."""
    if reason := missing():
        print(f"nothing ran. {reason}")
        return 1
    small()
    return 0


if __name__ == "__main__":
    sys.exit(main())
