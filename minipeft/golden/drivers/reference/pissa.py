"""PiSSA in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import lora, pissa
from minipeft.reference.lora import LoRA


def pissa_init(W: Array, r: int, alpha: float) -> tuple[Array, Array]:
    """Return the residual, and the update that the adapter starts with."""
    base, initial = pissa.init(W, r, alpha)
    return base, lora.delta(initial)


def pissa_to_lora(A: Array, B: Array, A_0: Array, B_0: Array) -> tuple[Array, Array]:
    """Return both matrices of the plain LoRA; the scaling stays what it is."""
    plain = pissa.to_lora(LoRA(A, B, 2.0), LoRA(A_0, B_0, 2.0))
    return plain.A, plain.B
