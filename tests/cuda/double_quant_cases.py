"""Cases of the double-quantization kernels for every check."""

from collections.abc import Collection

import numpy as np

from minipeft.cupy import double_quant as gpu
from minipeft.reference import double_quant as reference
from minipeft.reference.codebook import FP4, NF3, NF4
from tests.cuda.blockwise_cases import gaussian
from tests.cuda.executors import DTYPES
from tests.cuda.mutation import Mutation
from tests.tolerance import assert_bits


def agree(
    W: np.ndarray,
    codebook: np.ndarray,
    blocksizes: tuple[int, int],
    outputs: Collection[str] = tuple(DTYPES),
) -> None:
    """Quantize and dequantize with the launchers; compare every byte."""
    expected = reference.quantize(W, codebook, *blocksizes)
    q = gpu.quantize(W, codebook, *blocksizes)
    for part in ("packed", "absmax_codes", "nested_absmax", "offset"):
        assert_bits(getattr(q, part), getattr(expected, part))
    for name in outputs:
        values = reference.dequantize(expected, DTYPES[name])
        assert_bits(gpu.dequantize(q, name), values)


def uneven(n: int, dtype: str) -> np.ndarray:
    """Return weights whose scales spread over powers of ten, with a block of zeros."""
    rows = gaussian(n, dtype)
    size = np.float32(10) ** -(np.arange(n) // 64 % 5).astype(np.float32)
    rows = (rows.astype(np.float32) * size).astype(rows.dtype)
    rows[64:128] = 0
    return rows


def small(dtypes: Collection[str] = tuple(DTYPES)) -> None:
    """Run a few launches that reach every branch, for the slow checks."""
    for dtype in dtypes:
        agree(uneven(2 * 8192 + 77, dtype), NF4, (64, 256), [dtype])
        agree(
            uneven(4099, dtype), FP4, (8, 64), [dtype]
        )  # a few warps to a nested block
        agree(gaussian(3001, dtype), NF3, (2, 1024), [dtype])  # of several strides
        agree(gaussian(60, dtype), NF4, (64, 256), [dtype])  # one scale


SYNC = "  __syncthreads();\n"
MUTATIONS = (
    Mutation("no barrier after the maxima", SYNC, "", 2, ("values", "races")),
    Mutation(
        "a scale too many",
        "end = full < n ? full : n;",
        "end = full < n ? full : n + 1;",
        1,
        ("addresses", "ptx"),
    ),
    Mutation(
        "the next block's scale",
        "map[absmax_codes[block]]",
        "map[absmax_codes[block ^ 1]]",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "product and sum fused",
        "__fadd_rn(__fmul_rn(map[absmax_codes[block]], nested), *offset)",
        "__fmaf_rn(map[absmax_codes[block]], nested, *offset)",
        1,
        ("values", "ptx"),
    ),
)
