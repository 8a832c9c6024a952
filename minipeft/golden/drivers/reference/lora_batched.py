"""LoRA for a mixed batch in the NumPy column."""

import numpy as np

from minipeft.golden.arguments import NO_ADAPTER
from minipeft.golden.tensors import Array
from minipeft.reference import lora_batched
from minipeft.reference.lora_batched import Adapters


def lora_batched_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    scaling: Array,
    indices: Array,
    bias: Array | None = None,
) -> Array:
    """Return the output, each request with its own adapter."""
    signed = np.where(indices == NO_ADAPTER, -1, indices.astype(np.int32))
    return lora_batched.forward(x, W, Adapters(A, B, scaling), signed, bias)
