"""NumPy arrays to torch tensors and back, with every bit; on the CPU without a copy."""

import os

import numpy as np
import torch

from minipeft.golden.tensors import Array, numpy_dtype

# Where the drivers compute. `minipeft verify --device` sets it, for its workers too.
DEVICE = os.environ.get("MINIPEFT_DEVICE", "cpu")


def to_torch(array: Array) -> torch.Tensor:
    """Return a tensor on `DEVICE`; bfloat16 crosses as its bits."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(DEVICE)
    return torch.from_numpy(array).to(DEVICE)


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return an array from a tensor on any device."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()


def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """Return torch's dtype of the same name."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found
