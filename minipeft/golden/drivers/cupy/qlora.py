"""QLoRA's forward in the CuPy column, on NF4; there is no kernel that trains."""

from types import SimpleNamespace

from minipeft.cupy import lora_batched, qlora
from minipeft.cupy.blockwise import Blockwise
from minipeft.cupy.codebook import NF4
from minipeft.cupy.executor import current
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array
from minipeft.kernels.checks import GROUP

DEVICE = 0


def qlora_forward(
    x: Array,
    packed: Array,
    absmax: Array,
    A: Array,
    B: Array,
    alpha: float,
    blocksize: int,
    bias: Array | None = None,
) -> Array:
    """Return the output of the adapted layer."""
    shape = (B.shape[0], A.shape[1])
    if shape[1] % GROUP:
        raise Unsupported(
            f"the kernel takes rows of a multiple of {GROUP} values, not of {shape[1]}"
        )
    gpu = current()
    x, packed, absmax, codebook = (
        gpu.upload(array, DEVICE) for array in (x, packed, absmax, NF4)
    )
    q = Blockwise(packed, absmax, codebook, blocksize, shape)
    lora = SimpleNamespace(A=A, B=B, scaling=alpha / len(A))
    adapter = lora_batched.stack([lora], x.dtype.name, DEVICE)
    bias = None if bias is None else gpu.upload(bias, DEVICE)
    return gpu.download(qlora.forward(x, q, adapter, bias))
