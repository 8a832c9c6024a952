"""Every kernel under every check that needs no GPU.

values     g++ and shim.hpp, threads and blocks in shuffled orders
races      the same under ThreadSanitizer: is every access ordered by a barrier?
addresses  the same under Address- and UndefinedBehaviourSanitizer
ptx        NVRTC's own output, interpreted, for the oldest and the newest generation
"""

import pytest

from minipeft.cupy.executor import use
from minipeft.kernels import CTYPES
from tests.cuda.executors import CpuExecutor, PtxExecutor
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import ARCHITECTURES, needs_cpu_build, needs_nvrtc

ROW = pytest.mark.parametrize("row", ROWS)


@ROW
@needs_cpu_build
@pytest.mark.parametrize("seed", range(3))
def test_values(row, seed):
    with use(CpuExecutor("values", seed)):
        ROWS[row].small(CTYPES)


@ROW
@needs_cpu_build
@pytest.mark.parametrize("flavour", ["races", "addresses"])
def test_sanitizers(row, flavour):
    with use(CpuExecutor(flavour)):
        ROWS[row].small(CTYPES)


@ROW
@needs_nvrtc
@pytest.mark.parametrize("architecture", [ARCHITECTURES[0], ARCHITECTURES[-1]])
def test_ptx(row, architecture):
    with use(PtxExecutor(architecture)):
        ROWS[row].small(CTYPES)
