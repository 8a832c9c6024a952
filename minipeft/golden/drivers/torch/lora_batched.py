"""LoRA for a mixed batch in the torch column, through a pool of adapters."""

from torch import nn

from minipeft.golden.arguments import NO_ADAPTER
from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.drivers.torch.linear import layer
from minipeft.golden.tensors import Array
from minipeft.torch.lora import LoRA
from minipeft.torch.lora_batched import Pool


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
    pool = Pool(nn.Sequential(layer(W, bias)), ["0"])
    for name, parts in enumerate(zip(A, B, scaling.tolist(), strict=True)):
        pool.add(
            str(name), {"0": LoRA(to_torch(parts[0]), to_torch(parts[1]), parts[2])}
        )
    requests = [None if i == NO_ADAPTER else str(i) for i in indices.tolist()]
    with pool.serve(requests):
        return to_numpy(pool.model(to_torch(x)))
