"""Double quantization on a GPU: kernels/double_quant.cu under the reference's names."""

from dataclasses import dataclass
from functools import lru_cache
from math import fsum
from typing import Any

import numpy as np

from minipeft.cupy import blockwise
from minipeft.cupy.blockwise import DEQUANTIZE_TILE, check_size, log2_blocksize
from minipeft.cupy.codebook import NF4, code_bits, dynamic_map, midpoints_of_map
from minipeft.cupy.executor import Array, Executor, check, current
from minipeft.cupy.kernels import DEQUANTIZE_NESTED, NEST


@dataclass(frozen=True)
class Nested:
    """A quantized tensor whose scales are codes of the signed dynamic map."""

    packed: Array
    absmax_codes: Array
    nested_absmax: Array
    offset: np.float32
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
    # The exact sum, rounded once, is the same on every device; a weight's scales are
    # few enough to be added on the host.
    offset = np.float32(fsum(gpu.download(q.absmax)) / max(blocks, 1))
    codes = gpu.empty((blocks,), "uint8", device)
    nested_blocks = -(-blocks // nested_blocksize)
    nested_absmax = gpu.empty((nested_blocks,), "float32", device)
    midpoints = gpu.upload(midpoints_of_map(signed=True), device)
    args = [q.absmax, midpoints, codes, nested_absmax, blocks, offset, log2]
    gpu.launch(NEST, "float32", nested_blocks, args)
    sizes = (blocksize, nested_blocksize)
    return Nested(q.packed, codes, nested_absmax, offset, q.codebook, *sizes, q.shape)


def dequantize(q: Nested, dtype: Any = np.float32) -> Array:
    r"""Give the scales their values back, then the weights, in one pass.

    $\hat W_i = c_{q_i} \cdot (d_s \cdot a_2 + \bar a)$, each operation rounded to
    float32, the result once more to `dtype`.

    Args:
        q: what `quantize` returned.
        dtype: of the result: float32, float16 or bfloat16, as a NumPy dtype or name.

    Raises:
        InputError: if the parts of `q` do not fit each other, or `dtype` is another.
    """
    gpu = current()
    n = int(np.prod(q.shape, dtype=np.int64))
    device = gpu.facts(q.codebook).device
    bits = check_parts(gpu, q, device)
    name = blockwise.output_dtype(dtype)
    out = gpu.empty(q.shape, name, device)
    log2 = log2_blocksize(q.blocksize)
    args = [q.packed, *scales(gpu, q, device), q.codebook, out, n, log2, bits]
    gpu.launch(DEQUANTIZE_NESTED, name, -(-n // DEQUANTIZE_TILE), args)
    return out


def check_parts(gpu: Executor, q: Nested, device: int) -> int:
    """Return the bits of a code; refuse parts that a kernel would misread."""
    for blocksize in (q.blocksize, q.nested_blocksize):
        log2_blocksize(blocksize)
    n = int(np.prod(q.shape, dtype=np.int64))
    blocks = -(-n // q.blocksize)
    codebook = check("codebook", gpu.facts(q.codebook), ["float32"], device)
    bits = code_bits(codebook.size)
    for name, dtype, expected in (
        ("packed", "uint8", -(-n * bits // 8)),
        ("absmax_codes", "uint8", blocks),
        ("nested_absmax", "float32", -(-blocks // q.nested_blocksize)),
    ):
        facts = check(name, gpu.facts(getattr(q, name)), [dtype], device)
        check_size(name, facts, expected, q)
    return bits


def scales(gpu: Executor, q: Nested, device: int) -> list[Any]:
    """List the arguments by which a kernel decodes the scales."""
    log2 = log2_blocksize(q.nested_blocksize)
    return [q.absmax_codes, q.nested_absmax, _map(gpu, device), q.offset, log2]


@lru_cache(maxsize=8)
def _map(gpu: Executor, device: int) -> Array:  # one upload a device, not a call
    return gpu.upload(dynamic_map(), device)
