"""Managed memory: where it is stored, and when it moves.

Not through `cupy.cuda.runtime`: built for CUDA 13, its `memAdvise` and
`memPrefetchAsync` accept only devices as places, and not the host.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from minipeft.errors import InputError

# In place of the number of a device.
HOST = -1


def check(device: int) -> None:
    """Refuse a device that cannot page memory.

    Raises:
        InputError: if the device cannot load a page when a kernel accesses it.
    """
    if not concurrent(device):
        raise InputError(
            f"device {device} cannot page: under Windows and WSL the driver keeps all "
            "managed memory on the device while a kernel runs; use "
            "`minipeft.torch.paged`, which copies its pages."
        )


def settle(array: Any) -> None:
    """Store an array on the host, where its device can access it.

    Pages that leave the device go to the host and not to another device. The device
    can read a page on the host without loading it.

    Args:
        array: a CuPy array in managed memory.
    """
    if not array.nbytes:  # an empty range is an error to CUDA
        return
    cuda = _runtime()
    # Under CUDA 12 the functions that know the host as a place have names of their own.
    advise = getattr(cuda, "cudaMemAdvise_v2", cuda.cudaMemAdvise)
    advice = cuda.cudaMemoryAdvise
    for hint, place in (
        (advice.cudaMemAdviseSetPreferredLocation, HOST),
        (advice.cudaMemAdviseSetAccessedBy, array.device.id),
    ):
        _check(advise(array.data.ptr, array.nbytes, hint, _place(place)))


def prefetch(array: Any, device: int, stream: int) -> None:
    """Start moving an array.

    Args:
        array: a CuPy array in managed memory.
        device: its number, or `HOST`.
        stream: the address of a stream; the array moves after its earlier work.
    """
    if array.nbytes:
        cuda = _runtime()
        move = getattr(cuda, "cudaMemPrefetchAsync_v2", cuda.cudaMemPrefetchAsync)
        _check(move(array.data.ptr, array.nbytes, _place(device), 0, stream))


def fill(array: Any, value: int) -> None:
    """Fill an array from the host, so that all its pages start on the host.

    Args:
        array: a CuPy array in managed memory that no kernel has seen yet.
        value: of each element.
    """
    kind = ctypes.c_uint8 * array.nbytes
    here = np.ctypeslib.as_array(kind.from_address(array.data.ptr))
    here.view(array.dtype)[...] = value


@cache
def concurrent(device: int) -> bool:
    """Tell whether host and device may access managed memory at the same time."""
    cuda = _runtime()
    attribute = cuda.cudaDeviceAttr.cudaDevAttrConcurrentManagedAccess
    error, value = cuda.cudaDeviceGetAttribute(attribute, device)
    _check((error,))
    return bool(value)


def _place(device: int) -> Any:
    cuda = _runtime()
    kind = cuda.cudaMemLocationType
    place = cuda.cudaMemLocation()
    host = device == HOST
    place.type = (
        kind.cudaMemLocationTypeHost if host else kind.cudaMemLocationTypeDevice
    )
    place.id = 0 if host else device
    return place


def _check(answer: tuple[Any]) -> None:
    cuda = _runtime()
    if answer[0] != cuda.cudaError_t.cudaSuccess:
        _, text = cuda.cudaGetErrorString(answer[0])
        raise RuntimeError(f"CUDA: {text.decode()}")


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise InputError(
            "managed memory needs NVIDIA's bindings: run `pip install '.[cupy]'` in "
            "the clone of minipeft."
        ) from None
    return runtime
