"""NumPy arrays to torch tensors and back, without a copy and with every bit."""

import numpy as np
import torch

from minipeft.golden.tensors import Array, numpy_dtype


def to_torch(array: Array) -> torch.Tensor:
    """Return a tensor on the same memory; bfloat16 crosses as its bits."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return an array on the same memory."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()


def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """Return torch's dtype of the same name."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found
