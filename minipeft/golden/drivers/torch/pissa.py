"""PiSSA in the torch column."""

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch import lora, pissa
from minipeft.torch.lora import LoRA


def pissa_init(W: Array, r: int, alpha: float) -> tuple[Array, Array]:
    """Return the residual, and the update that the adapter starts with."""
    base, initial = pissa.init(to_torch(W), r, alpha)
    return to_numpy(base), to_numpy(lora.delta(initial))


def pissa_to_lora(A: Array, B: Array, A_0: Array, B_0: Array) -> tuple[Array, Array]:
    """Return both matrices of the plain LoRA; the scaling stays what it is."""
    trained = LoRA(to_torch(A), to_torch(B), 2.0)
    plain = pissa.to_lora(trained, LoRA(to_torch(A_0), to_torch(B_0), 2.0))
    return to_numpy(plain.A), to_numpy(plain.B)
