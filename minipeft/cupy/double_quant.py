"""Double quantization on a GPU: kernels/double_quant.cu under the reference's names."""

from dataclasses import dataclass
from functools import lru_cache
from math import fsum
from typing import Any

import numpy as np

from minipeft.cupy import blockwise
from minipeft.cupy.codebook import NF4, dynamic_map
from minipeft.cupy.executor import Array, Executor, current
from minipeft.kernels import DEQUANTIZE_NESTED, NEST
from minipeft.kernels.checks import Layout, check_codes, check_nested, log2_blocksize
from minipeft.kernels.tables import midpoints


@dataclass(frozen=True)
class Nested:
    """A quantized tensor whose scales are codes of the signed dynamic map."""

    packed: Array
    absmax_codes: Array
    nested_absmax: Array
    offset: Array
    codebook: Array
    blocksize: int
    nested_blocksize: int
    shape: tuple[int, ...]


def quantize(
    W: Any,
    codebook: np.ndarray = NF4,
    blocksize: int = 64,
    nested_blocksize: int = 256,
) -> Nested:
    r"""Quantize the weights, then their scales around the mean scale.

    Args:
        W: float32, float16 or bfloat16 on a device, of any shape, C-contiguous.
        codebook: 2, 4, 8 or 16 float32 values in the order of their codes, in NumPy.
        blocksize: weights that share a scale, a power of two.
        nested_blocksize: scales that share a nested scale, a power of two.

    Raises:
        InputError: as `blockwise.quantize`; if `nested_blocksize` is no power of two.

    Source: QLoRA (arXiv:2305.14314), section 3, "Double Quantization".
    """
    gpu = current()
    log2 = log2_blocksize(nested_blocksize)
    q = blockwise.quantize(W, codebook, blocksize)
    facts = gpu.facts(q.absmax)
    blocks, device = facts.size, facts.device
    # The exact sum, rounded once, is the same on every device. A weight has so few
    # scales that the host can add them.
    offset = np.float32(fsum(gpu.download(q.absmax)) / max(blocks, 1))
    codes = gpu.empty((blocks,), "uint8", device)
    nested_blocks = -(-blocks // nested_blocksize)
    nested_absmax = gpu.empty((nested_blocks,), "float32", device)
    boundaries = gpu.upload(midpoints(dynamic_map()), device)
    args = [q.absmax, boundaries, codes, nested_absmax, blocks, offset, log2]
    gpu.launch(NEST, "float32", args)
    sizes, there = (blocksize, nested_blocksize), gpu.upload(np.array(offset), device)
    return Nested(q.packed, codes, nested_absmax, there, q.codebook, *sizes, q.shape)


def dequantize(q: Nested, dtype: Any = np.float32) -> Array:
    r"""Decode the scales and the weights in one pass.

    $\hat W_i = q_{c_i} \cdot (q'_{c'} \cdot a' + \bar a)$, each operation rounded to
    float32, the result once more to `dtype`.

    Args:
        q: what `quantize` returned.
        dtype: of the result: float32, float16 or bfloat16, as a NumPy dtype or name.

    Raises:
        InputError: if the parts of `q` do not fit each other, or `dtype` is another.
    """
    gpu = current()
    layout, bits = check_parts(gpu, q)
    n, device = layout.size, gpu.facts(q.codebook).device
    name = blockwise.output_dtype(dtype)
    out = gpu.empty(q.shape, name, device)
    log2 = log2_blocksize(q.blocksize)
    args = [q.packed, *scales(gpu, q, device), q.codebook, out, n, log2, bits]
    gpu.launch(DEQUANTIZE_NESTED, name, args)
    return out


def check_parts(gpu: Executor, q: Nested) -> tuple[Layout, int]:
    """Return the layout and bits of a code; refuse what a kernel would misread."""
    layout = Layout(q.shape, q.blocksize, q.nested_blocksize)
    packed, codes, nested, codebook = map(
        gpu.facts, (q.packed, q.absmax_codes, q.nested_absmax, q.codebook)
    )
    bits = check_codes(packed, codes, codebook, layout)
    check_nested(nested, gpu.facts(q.offset), layout, codebook.device)
    return layout, bits


def scales(gpu: Executor, q: Nested, device: int) -> list[Any]:
    """Return the arguments with which a kernel decodes the scales."""
    log2 = log2_blocksize(q.nested_blocksize)
    return [
        q.absmax_codes,
        q.nested_absmax,
        _map(gpu, device, gpu.stream(device)),
        q.offset,
        log2,
    ]


# One copy for each device and stream: a kernel on another stream could start first.
@lru_cache(maxsize=8)
def _map(gpu: Executor, device: int, stream: int) -> Array:
    return gpu.upload(dynamic_map(), device)
