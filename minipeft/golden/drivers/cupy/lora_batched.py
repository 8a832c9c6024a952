"""LoRA for a mixed batch in the CuPy column: its kernels add to a base's output."""

from types import SimpleNamespace

import numpy as np

from minipeft.cupy import lora_batched
from minipeft.cupy.executor import current
from minipeft.golden.arguments import NO_ADAPTER
from minipeft.golden.tensors import Array


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
    base = x @ W.T if bias is None else x @ W.T + bias
    stacked = zip(A, B, scaling.tolist(), strict=True)
    loras = [SimpleNamespace(A=a, B=b, scaling=s) for a, b, s in stacked]
    each = np.ones(x.shape[:-1], np.int32).reshape(len(x), -1)
    chosen = np.where(indices == NO_ADAPTER, -1, indices.astype(np.int32))
    rows, outputs = x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1])
    every = (each * chosen[:, None]).reshape(-1)
    found = lora_batched.forward(rows, outputs, lora_batched.stack(loras), every)
    return current().download(found).reshape(base.shape)
