"""The blockwise kernels, run on this CPU through their launchers.

A GPU runs the same source; here g++ compiles it with shim.hpp. Every byte of the
results is the reference's.
"""

import numpy as np
import pytest

from minipeft.cupy import blockwise as gpu
from minipeft.cupy.executor import use
from minipeft.errors import InputError
from minipeft.reference.codebook import NF4
from tests.cuda.blockwise_cases import CODEBOOKS, agree, awkward, gaussian
from tests.cuda.executors import DTYPES, CpuExecutor
from tests.cuda.toolchain import needs_cpu_build

pytestmark = needs_cpu_build
DTYPE = pytest.mark.parametrize("dtype", DTYPES)
CODEBOOK = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
BLOCKSIZES = [2**k for k in range(13)]


@DTYPE
@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_ragged_sizes_at_every_blocksize(n, dtype):
    with use(CpuExecutor()):
        for blocksize in BLOCKSIZES:
            agree(gaussian(n, dtype), NF4, blocksize)


@DTYPE
@CODEBOOK
def test_awkward_blocks_at_every_kind_of_reduction(dtype, codebook):
    with use(CpuExecutor()):
        for blocksize in [1, 4, 64, 256, 512]:
            agree(awkward(codebook, dtype), codebook, blocksize)


@pytest.mark.parametrize("blocksize", BLOCKSIZES[3:])
def test_a_large_ragged_tensor(blocksize):
    n, dtype = 2**20 + 3, list(DTYPES)[blocksize.bit_length() % 3]
    with use(CpuExecutor(seed=blocksize)):
        agree(gaussian(n, dtype), NF4, blocksize)


def test_one_block_longer_than_the_tensor():
    with use(CpuExecutor()):
        agree(gaussian(5000), NF4, 2**15)


@CODEBOOK
def test_an_empty_tensor(codebook):
    with use(CpuExecutor()):
        agree(np.zeros((0, 3), np.float32), codebook, 64)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_threads_and_blocks_does_not_matter(seed):
    with use(CpuExecutor(seed=seed)):
        for blocksize in [64, 512, 2048]:
            agree(gaussian(3 * 8192 + 5, "float16"), NF4, blocksize)


@DTYPE
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_value_that_is_not_finite_is_named(dtype, bad):
    W = gaussian(9000, dtype)
    W[[8999, 4321, 4400]] = bad
    with (
        use(CpuExecutor()),
        pytest.raises(InputError, match=rf"{bad} at flat index 4321\b"),
    ):
        gpu.quantize(W)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((np.zeros(4, np.float64),), "W is float64; give one of"),
        ((np.zeros((4, 6), np.float32).T,), "not C-contiguous"),
        ((np.zeros(9, np.float32)[1:],), "4 bytes past a multiple of 16"),
        (
            (np.zeros(4, np.float32), NF4, 48),
            "blocksize is 48; choose a power of two",
        ),
        ((np.zeros(4, np.float32), NF4, 0), "blocksize is 0"),
        ((np.zeros(4, np.float32), np.zeros(5, np.float32)), "has 5 values"),
        ((np.zeros(4, np.float32), np.zeros(16)), "codebook is float64"),
    ],
)
def test_what_a_kernel_would_misread_is_refused(arguments, sentence):
    with use(CpuExecutor()), pytest.raises(InputError, match=sentence):
        gpu.quantize(*arguments)


def test_parts_that_do_not_fit_are_refused():
    with use(CpuExecutor()):
        q = gpu.quantize(gaussian(100))
        with pytest.raises(InputError, match="packed has 50 values where shape"):
            gpu.dequantize(gpu.Blockwise(q.packed, q.absmax, q.codebook, 64, (102,)))
        with pytest.raises(InputError, match="absmax has 2 values"):
            gpu.dequantize(gpu.Blockwise(q.packed, q.absmax, q.codebook, 32, (100,)))
        with pytest.raises(InputError, match="blocksize is 0"):
            gpu.dequantize(gpu.Blockwise(q.packed, q.absmax, q.codebook, 0, (100,)))
        with pytest.raises(InputError, match="cannot dequantize to float64"):
            gpu.dequantize(q, np.float64)
