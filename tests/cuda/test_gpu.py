"""The same launchers on a real device; skipped, with one line, where there is none."""

import numpy as np
import pytest

from minipeft.cupy import adamw, executor, managed, paged
from minipeft.cupy import blockwise as gpu
from minipeft.errors import InputError
from minipeft.kernels import CTYPES
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


PAGE = 2**19  # values: 2 MB in float32, whole pages on any device


def hint(array, name):
    """Return an attribute of a range of managed memory, from CUDA."""
    import cupy
    from cuda.bindings import runtime

    cupy.cuda.Device().synchronize()
    attribute = getattr(runtime.cudaMemRangeAttribute, f"cudaMemRangeAttribute{name}")
    given = runtime.cudaMemRangeGetAttribute(4, attribute, array.data.ptr, array.nbytes)
    assert given[0] == runtime.cudaError_t.cudaSuccess
    return given[1]


@pytest.fixture
def pages():
    """Return four pages of an optimizer's states in managed memory."""
    import cupy

    pytest.importorskip("cuda.bindings")
    if not managed.concurrent(0):
        pytest.skip("this driver pages on its own and takes no hints")
    W = cupy.asarray(gaussian(4 * PAGE))
    return W, paged.init([adamw.init(W)], PAGE, 2)


def test_states_are_at_home_on_the_host_and_reachable(pages):
    _, p = pages
    for moment in (paged.gather(p, 0).m, paged.gather(p, 0).v):
        assert hint(moment, "PreferredLocation") == executor.HOST
        assert hint(moment, "LastPrefetchLocation") == executor.HOST
        assert hint(moment, "AccessedBy") in (0, [0])


def test_pages_lie_where_they_were_sent(pages):
    _, p = pages

    def places():
        state = paged.gather(p, 0)
        cuts = [slice(i * PAGE, (i + 1) * PAGE) for i in range(4)]
        found = [
            {hint(moment[cut], "LastPrefetchLocation") for moment in (state.m, state.v)}
            for cut in cuts
        ]
        return [place for (place,) in found]

    host = executor.HOST
    p = paged.prefetch(p, 1)
    assert places() == [host, 0, host, host]
    p = paged.touch(paged.touch(p, 2), 3)  # beyond the budget: page 1 is evicted
    assert places() == [host, host, 0, 0]
    p = paged.evict(p, 2)
    assert places() == [host, host, host, 0]


def test_a_paged_step_is_the_unpaged_one(pages):
    import cupy

    W, p = pages
    config, state = adamw.AdamW(), adamw.init(W)
    paged_W = W
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grad = cupy.asarray(rng.standard_normal(W.size, np.float32))
        paged_W, p = paged.step(p, 0, paged_W, grad, config)
        W, state = adamw.step(W, grad, state, config)
    after = paged.gather(p, 0)
    for got, expected in ((paged_W, W), (after.m, state.m), (after.v, state.v)):
        assert_bits(cupy.asnumpy(got), cupy.asnumpy(expected))
