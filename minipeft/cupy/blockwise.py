"""Blockwise quantization on a GPU: kernels/blockwise.cu under the reference's names."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from minipeft.cupy.codebook import NF4
from minipeft.cupy.executor import Array, Executor, current
from minipeft.errors import InputError
from minipeft.kernels import CTYPES, DEQUANTIZE, QUANTIZE
from minipeft.kernels.checks import Layout, check, check_codes, log2_blocksize
from minipeft.kernels.tables import sort


@dataclass(frozen=True)
class Blockwise:
    """A quantized tensor on one device: codes, and a scale for each block of values."""

    packed: Array
    absmax: Array
    codebook: Array
    blocksize: int
    shape: tuple[int, ...]


def quantize(W: Any, codebook: np.ndarray = NF4, blocksize: int = 64) -> Blockwise:
    r"""Round every value to the nearest code of its scaled block.

    $c_i = \arg\min_k |q_k - W_i / a|$ with $a = \max_{j \in \text{block}} |W_j|$.

    Args:
        W: float32, float16 or bfloat16 on a device, of any shape, C-contiguous.
        codebook: 2, 4, 8 or 16 float32 values in the order of their codes, in NumPy.
        blocksize: values in a block, a power of two.

    Raises:
        InputError: at the first NaN or infinity; if the array, the codebook or
            `blocksize` is another one.

    Source: QLoRA (arXiv:2305.14314), sections 2 and 3.
    """
    gpu = current()
    log2 = log2_blocksize(blocksize)
    table = sort(codebook)
    W = gpu.adopt(W)
    facts = check("W", gpu.facts(W), CTYPES)
    n, device = facts.size, facts.device
    q = Blockwise(
        gpu.empty((-(-n * table.bits // 8),), "uint8", device),
        gpu.empty((-(-n // blocksize),), "float32", device),
        gpu.upload(codebook, device),
        blocksize,
        facts.shape,
    )
    bad = gpu.upload(np.array([n], np.uint64), device)
    search = [gpu.upload(table.midpoints, device), table.order]
    sizes = [n, log2, table.bits]
    args = [W, *search, q.packed, q.absmax, bad, *sizes]
    gpu.launch(QUANTIZE, facts.dtype, args)
    _check_finite(gpu, W, int(gpu.download(bad)[0]), n)
    return q


def dequantize(q: Blockwise, dtype: Any = np.float32) -> Array:
    r"""Replace every code by its value: $\hat W_i = q_{c_i} \cdot a$.

    The product is rounded to float32, and once more to `dtype`.

    Args:
        q: what `quantize` returned.
        dtype: of the result: float32, float16 or bfloat16, as a NumPy dtype or name.

    Raises:
        InputError: if the parts of `q` do not fit each other, or `dtype` is another.
    """
    gpu = current()
    layout, bits = check_parts(gpu, q)
    n, device = layout.size, gpu.facts(q.codebook).device
    name = output_dtype(dtype)
    out = gpu.empty(q.shape, name, device)
    log2 = log2_blocksize(q.blocksize)
    args = [q.packed, q.absmax, q.codebook, out, n, log2, bits]
    gpu.launch(DEQUANTIZE, name, args)
    return out


def check_parts(gpu: Executor, q: Blockwise) -> tuple[Layout, int]:
    """Return the layout and bits of a code; refuse what a kernel would misread."""
    layout = Layout(q.shape, q.blocksize)
    packed, absmax, codebook = map(gpu.facts, (q.packed, q.absmax, q.codebook))
    return layout, check_codes(packed, absmax, codebook, layout)


def output_dtype(dtype: Any) -> str:
    """Return the name of the output dtype; refuse a dtype that no kernel writes."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in CTYPES:
        raise InputError(f"cannot dequantize to {name}; choose one of {list(CTYPES)}.")
    return name


def _check_finite(gpu: Executor, W: Array, first_bad: int, n: int) -> None:
    if first_bad < n:
        value = gpu.download(W.reshape(-1)[first_bad : first_bad + 1])[0]
        raise InputError(
            f"W holds {value} at flat index {first_bad}, the first value that is not "
            "finite; repair the weights before quantizing them."
        )
