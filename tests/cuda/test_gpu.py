"""The same launchers on a real device. Skipped, with one line, where there is none."""

import numpy as np
import pytest

from minipeft.cupy import blockwise as gpu
from minipeft.cupy import executor
from minipeft.cupy.kernels import CTYPES
from minipeft.errors import InputError
from minipeft.reference import blockwise as reference
from minipeft.reference.codebook import NF4
from tests.cuda.blockwise_cases import CODEBOOKS, awkward, gaussian
from tests.cuda.executors import DTYPES, DeviceExecutor
from tests.cuda.rows import ROWS
from tests.tolerance import assert_bits

if executor.missing():
    pytest.skip(executor.missing(), allow_module_level=True)
pytestmark = pytest.mark.gpu


def agree(W, codebook, blocksize):
    import cupy

    expected = reference.quantize(W, codebook, blocksize)
    q = gpu.quantize(cupy.asarray(W), codebook, blocksize)
    assert_bits(cupy.asnumpy(q.packed), expected.packed)
    assert_bits(cupy.asnumpy(q.absmax), expected.absmax)
    for name, dtype in DTYPES.items():
        values = reference.dequantize(expected, dtype)
        assert_bits(cupy.asnumpy(gpu.dequantize(q, name)), values)


@pytest.mark.parametrize("row", ROWS)
def test_every_row(row):
    """The cases that all checks run, on the device."""
    with executor.use(DeviceExecutor()):
        ROWS[row].small(CTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 2**20 + 3])
def test_blockwise_agrees(n, dtype):
    for k in range(13):
        agree(gaussian(n, dtype), NF4, 2**k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_awkward_blocks(codebook, dtype):
    for blocksize in [1, 4, 64, 256, 512]:
        agree(awkward(codebook, dtype), codebook, blocksize)


def test_the_first_bad_index_is_named():
    import cupy

    W = gaussian(9000)
    W[[4321, 4400]] = np.nan
    with pytest.raises(InputError, match=r"nan at flat index 4321\b"):
        gpu.quantize(cupy.asarray(W))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_torch_tensor_is_read_where_it_lies(dtype):
    torch = pytest.importorskip("torch")
    W = torch.randn(129, 65, device="cuda", dtype=getattr(torch, dtype))
    adopted = executor.current().adopt(W)
    assert adopted.data.ptr == W.data_ptr()
    q = gpu.quantize(W)
    back = torch.from_dlpack(gpu.dequantize(q, dtype))
    assert back.device == W.device
    assert back.dtype == W.dtype
