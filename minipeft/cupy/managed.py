"""Where managed memory lives, and when it moves.

Not through `cupy.cuda.runtime`: built for CUDA 13, its `memAdvise` and
`memPrefetchAsync` call every place a device, and the host is none.
"""

from functools import cache
from typing import Any

from minipeft.errors import InputError

# In place of the number of a device.
HOST = -1


def settle(array: Any) -> None:
    """Make the host the home of an array, and let its device reach it there.

    What is not on the device goes home to the host, not to another device; the device
    may read it there instead of faulting it in.

    Args:
        array: a CuPy array in managed memory.
    """
    if not _takes_hints(array):
        return
    cuda = _runtime()
    advice = cuda.cudaMemoryAdvise
    for hint, place in (
        (advice.cudaMemAdviseSetPreferredLocation, HOST),
        (advice.cudaMemAdviseSetAccessedBy, array.device.id),
    ):
        _check(cuda.cudaMemAdvise(array.data.ptr, array.nbytes, hint, _place(place)))


def prefetch(array: Any, device: int, stream: int) -> None:
    """Start moving an array.

    Args:
        array: a CuPy array in managed memory.
        device: its number, or `HOST`.
        stream: the address of the stream in turn with whose kernels it moves.
    """
    if _takes_hints(array):
        place, size = _place(device), array.nbytes
        move = _runtime().cudaMemPrefetchAsync
        _check(move(array.data.ptr, size, place, 0, stream))


def _takes_hints(array: Any) -> bool:
    # An empty range is an error to CUDA.
    return bool(array.nbytes) and concurrent(array.device.id)


@cache
def concurrent(device: int) -> bool:
    """Say whether a device takes hints: under Windows and WSL the driver refuses."""
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
            "managed memory needs NVIDIA's bindings: `pip install 'cuda-bindings>=13'`."
        ) from None
    return runtime
