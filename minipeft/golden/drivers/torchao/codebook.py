"""The one codebook of torchao: NF4, in four decimals."""

import torch
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor

from minipeft.golden.drivers.bridge import to_numpy
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array


def codebook_table(name: str) -> Array:
    """Return the values that it uses for weights in float32."""
    if name != "nf4":
        raise Unsupported(f"torchao has no {name}")
    return to_numpy(NF4Tensor.from_tensor(torch.ones(2), 2, 1).nf4)
