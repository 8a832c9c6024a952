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

    cupy.cuda.set_allocator(None)  # in a pool, a neighbour would hide an overrun
    with use(DeviceExecutor()):
        for row in ROWS.values():
            row.small(CTYPES)


def main() -> int:
    """Return 0; 1 where there is no GPU, for a moment ago there was one."""
    if reason := missing():
        print(f"nothing ran. {reason}")
        return 1
    small()
    return 0


if __name__ == "__main__":
    sys.exit(main())
