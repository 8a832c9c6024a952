"""LoftQ in the torch column."""

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch import loftq, lora
from minipeft.torch.codebook import NF4


def loftq_init(
    W: Array, r: int, alpha: float, blocksize: int, steps: int
) -> tuple[Array, Array, Array]:
    """Return codes and scales of the base, and the adapter's first update."""
    q, initial = loftq.init(to_torch(W), r, alpha, NF4, blocksize, steps)
    return to_numpy(q.packed), to_numpy(q.absmax), to_numpy(lora.delta(initial))
