"""Read and write a tensor slice by slice in row-major order, for all strides."""

from collections.abc import Iterator

import torch
from torch import Tensor

from minipeft.shapes import Inexact

SLICE = 2**16  # values per slice, a multiple of 256, so that no block is cut

Whole = Inexact[Tensor, "..."]
Slice = Inexact[Tensor, " n"]


def slices(span: slice) -> Iterator[slice]:
    """Cut a range of values into pieces of at most `SLICE`."""
    for start in range(span.start, span.stop, SLICE):
        yield slice(start, min(start + SLICE, span.stop))


def read(tensor: Whole, part: slice) -> Slice:
    """Return the values of a slice: a view of a contiguous tensor, else a copy."""
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return flat if len(flat) == part.stop - part.start else flat[part]
    return _memory(tensor)[_places(tensor, part)]


def write(tensor: Whole, part: slice, values: Slice) -> None:
    """Store the values of a slice, rounded to the dtype of the tensor."""
    if tensor.is_contiguous():
        tensor.view(-1)[part].copy_(values)
    else:
        _memory(tensor)[_places(tensor, part)] = values.to(tensor.dtype)


def _memory(tensor: Whole) -> Slice:
    # `reshape` would copy the whole of a transposed tensor.
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.detach().as_strided((1 + sum((n - 1) * s for n, s in pairs),), (1,))


def _places(tensor: Whole, part: slice) -> Tensor:
    index = torch.arange(part.start, part.stop, device=tensor.device)
    places = torch.zeros_like(index)
    for n, stride in zip(
        reversed(tensor.shape), reversed(tensor.stride()), strict=True
    ):
        places += index % n * stride
        index = index // n
    return places
