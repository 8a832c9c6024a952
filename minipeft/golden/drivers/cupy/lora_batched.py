"""LoRA for a mixed batch in the CuPy column: its kernels add to a base's output."""

from math import prod
from types import SimpleNamespace

import numpy as np

from minipeft.cupy import lora_batched
from minipeft.cupy.executor import current
from minipeft.golden.arguments import NO_ADAPTER
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array

DEVICE = 0


def lora_batched_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    scaling: Array,
    indices: Array,
    bias: Array | None = None,
) -> Array:
    """Return the output; the product of the base, which has no kernel, is NumPy's."""
    if bias is not None:
        raise Unsupported("the kernel adds to an output in which the bias is already")
    stacked = zip(A, B, scaling.tolist(), strict=True)
    loras = [SimpleNamespace(A=a, B=b, scaling=s) for a, b, s in stacked]
    chosen = np.where(indices == NO_ADAPTER, -1, indices.astype(np.int32))
    gpu, y = current(), x @ W.T
    rows, outputs = (gpu.upload(a.reshape(-1, a.shape[-1]), DEVICE) for a in (x, y))
    adapters = lora_batched.stack(loras, x.dtype.name, DEVICE)
    every = np.repeat(chosen, prod(x.shape[1:-1]))
    found = lora_batched.forward(rows, outputs, adapters, every)
    return gpu.download(found).reshape(y.shape)
