"""LoftQ in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import loftq, lora
from minipeft.reference.codebook import NF4


def loftq_init(
    W: Array, r: int, alpha: float, blocksize: int, steps: int
) -> tuple[Array, Array, Array]:
    """Return codes and scales of the base, and the adapter's first update."""
    q, initial = loftq.init(W, r, alpha, NF4, blocksize, steps)
    return q.packed, q.absmax, lora.delta(initial)
