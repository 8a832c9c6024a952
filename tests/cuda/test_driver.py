"""The calls of the driver for a launch, with its functions replaced by recorders."""

import ctypes

import numpy as np
import pytest

from minipeft.kernels import (
    ADAMW,
    DEQUANTIZE,
    KERNELS,
    POINTER,
    PRODUCT_4BIT,
    driver,
)
from minipeft.kernels.checks import Facts
from tests.cuda.toolchain import needs_nvrtc

cuda = pytest.importorskip("cuda.bindings.driver")
OK = cuda.CUresult.CUDA_SUCCESS
pytestmark = needs_nvrtc
CACHES = (driver._context, driver.architecture, driver._library, driver._function)


def array(size, address, dtype="uint8", itemsize=1):
    return Facts(dtype, (size,), True, 3, address, itemsize)


@pytest.fixture
def told(monkeypatch):
    """Record every call; all devices are of generation 9.0."""
    calls = []

    def note(name, *results):
        def function(*arguments):
            calls.append((name, *arguments))
            return (OK, *results)

        monkeypatch.setattr(cuda, name, function)

    note("cuInit")
    note("cuDeviceGetAttribute", 9)
    monkeypatch.setattr(
        cuda, "cuDeviceGetAttribute", lambda what, _: (OK, 9 * ("MAJOR" in what.name))
    )
    note("cuDevicePrimaryCtxRetain", "a context")
    note("cuCtxPushCurrent")
    note("cuCtxPopCurrent", "a context")
    note("cuLibraryLoadData", "a library")
    note("cuLibraryGetKernel", 0x7000)
    note("cuLaunchKernel")
    for cached in CACHES:
        cached.cache_clear()
    yield calls
    for cached in CACHES:
        cached.cache_clear()


ARGUMENTS = [
    array(4097, 0x100),
    array(129, 0x200, "float32", 4),
    array(16, 0x300, "float32", 4),
    array(8193, 0x400, "float16", 2),
    *(8193, 6, 4),
]


def test_a_launch_is_of_the_table(told):
    driver.launch(DEQUANTIZE, "float16", ARGUMENTS, 77)
    names = [name for name, *_ in told]
    assert names == [
        "cuInit",
        "cuLibraryLoadData",
        "cuLibraryGetKernel",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent",
        "cuLaunchKernel",
        "cuCtxPopCurrent",
    ]
    _, image, *_ = told[1]
    assert image.startswith(b"\x7fELF")
    _, library, name = told[2]
    assert library == "a library"
    assert told[3] == ("cuDevicePrimaryCtxRetain", ARGUMENTS[0].device)
    assert b"dequantize" in name
    assert b"half" in name
    _, function, *shape, (values, kinds), extra = told[5]
    assert int(function) == 0x7000
    assert shape == [2, 1, 1, 256, 1, 1, 0, 77]
    assert values == (0x100, 0x200, 0x300, 0x400, 8193, 6, 4)
    pointer = ctypes.c_void_p
    assert kinds == (*[pointer] * 4, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32)
    assert extra == 0


def test_what_is_known_is_not_asked_again(told):
    for _ in range(2):
        driver.launch(DEQUANTIZE, "float16", ARGUMENTS, 0)
    assert [name for name, *_ in told][-3:] == [
        "cuCtxPushCurrent",
        "cuLaunchKernel",
        "cuCtxPopCurrent",
    ]
    assert [name for name, *_ in told].count("cuLibraryLoadData") == 1


def test_a_missing_array_is_a_null_pointer(told):
    arrays = [None if k == POINTER else 1 for k in PRODUCT_4BIT.arguments.values()]
    arrays[0] = array(64, 0x100)
    driver.launch(PRODUCT_4BIT, "float32", arrays, 0)
    values = told[-2][-2][0]
    assert values[:2] == (0x100, 0)


def test_an_empty_grid_is_no_launch(told):
    nothing = [array(0, 0)] * 4 + [0, 6, 4]
    driver.launch(DEQUANTIZE, "float16", nothing, 0)
    assert told == []


def test_what_the_driver_refuses_is_said_and_the_context_is_left(told, monkeypatch):
    error = cuda.CUresult.CUDA_ERROR_INVALID_VALUE
    monkeypatch.setattr(cuda, "cuLaunchKernel", lambda *_: (error,))
    monkeypatch.setattr(cuda, "cuGetErrorString", lambda _: (OK, b"invalid argument"))
    with pytest.raises(RuntimeError, match=r"^CUDA: invalid argument$"):
        driver.launch(DEQUANTIZE, "float16", ARGUMENTS, 0)
    assert told[-1][0] == "cuCtxPopCurrent"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.template)
def test_the_bindings_take_the_arguments_of_every_kernel(kernel):
    """NVIDIA's own packing refuses a value that does not fit its width."""
    kinds = tuple(driver.CTYPES[kind] for kind in kernel.arguments.values())
    args = [array(1, 16) if k == POINTER else 1 for k in kernel.arguments.values()]
    values = tuple(map(driver._value, kernel.pack(args)))
    cuda._HelperKernelParams((values, kinds))
    with pytest.raises(TypeError):
        cuda._HelperKernelParams((("an address", *values[1:]), kinds))


@pytest.mark.parametrize(
    ("dtype", "n", "blocks"),
    [("float32", 1024, 1), ("float32", 1025, 2), ("bfloat16", 2048, 1)],
)
def test_a_thread_of_adamw_takes_16_bytes(dtype, n, blocks):
    args = [np.float32(0) if k != POINTER else None for k in ADAMW.arguments.values()]
    args[list(ADAMW.arguments).index("n")] = n
    assert ADAMW.grid(args, dtype) == blocks
