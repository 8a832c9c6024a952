"""The double-quantization kernels, run on this CPU through their launchers."""

import numpy as np
import pytest

from minipeft.cupy import codebook as tables
from minipeft.cupy import double_quant as gpu
from minipeft.cupy.executor import use
from minipeft.errors import InputError
from minipeft.reference import codebook as reference
from tests.cuda.double_quant_cases import agree, uneven
from tests.cuda.executors import DTYPES, CpuExecutor
from tests.cuda.toolchain import needs_cpu_build
from tests.tolerance import assert_bits


@needs_cpu_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_ragged_sizes(n, dtype):
    with use(CpuExecutor()):
        for blocksizes in [(64, 256), (1, 1), (32, 8), (4096, 2)]:
            agree(uneven(n, dtype), reference.NF4, blocksizes)


@needs_cpu_build
def test_a_large_ragged_tensor():
    with use(CpuExecutor(seed=1)):
        agree(uneven(2**20 + 3, "bfloat16"), reference.NF4, (64, 256))


@needs_cpu_build
def test_an_empty_tensor():
    with use(CpuExecutor()):
        agree(np.zeros((0, 3), np.float32), reference.NF4, (64, 256))


@needs_cpu_build
def test_parts_that_do_not_fit_are_refused():
    with use(CpuExecutor()):
        q = gpu.quantize(uneven(1000, "float32"))
        wrong = gpu.Nested(**{**vars(q), "absmax_codes": q.absmax_codes[:-1]})
        with pytest.raises(InputError, match="absmax_codes has 15 values where shape"):
            gpu.dequantize(wrong)
        with pytest.raises(InputError, match="blocksize is 0"):
            gpu.dequantize(gpu.Nested(**{**vars(q), "nested_blocksize": 0}))
        with pytest.raises(InputError, match="blocksize is 100"):
            gpu.quantize(uneven(1000, "float32"), nested_blocksize=100)


@pytest.mark.parametrize("signed", [True, False])
def test_the_column_has_the_reference_tables(signed):
    assert_bits(tables.dynamic_map(signed), reference.dynamic_map(signed))
    assert_bits(tables.NF4, reference.NF4)
    assert_bits(tables.FP4, reference.FP4)
