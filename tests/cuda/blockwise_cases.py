"""Cases of the blockwise kernels for every check: launches, all bits compared."""

from collections.abc import Collection

import numpy as np

from minipeft.cupy import blockwise as gpu
from minipeft.reference import blockwise as reference
from minipeft.reference.codebook import FP4, NF2, NF3, NF4
from tests.cuda.executors import DTYPES
from tests.cuda.mutation import Mutation
from tests.tolerance import assert_bits

CODEBOOKS = {"NF4": NF4, "FP4": FP4, "NF3": NF3, "NF2": NF2}


def agree(
    W: np.ndarray,
    codebook: np.ndarray,
    blocksize: int,
    outputs: Collection[str] = tuple(DTYPES),
) -> None:
    """Quantize and dequantize with the launchers; compare every byte."""
    with np.errstate(over="ignore"):
        expected = reference.quantize(W, codebook, blocksize)
    q = gpu.quantize(W, codebook, blocksize)
    assert_bits(q.packed, expected.packed)
    assert_bits(q.absmax, expected.absmax)
    assert (q.blocksize, q.shape) == (expected.blocksize, expected.shape)
    for name in outputs:
        values = reference.dequantize(expected, DTYPES[name])
        assert_bits(gpu.dequantize(q, name), values)


def gaussian(n: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(n)
    return rng.standard_normal(n, np.float32).astype(DTYPES[dtype])


def awkward(codebook: np.ndarray, dtype: str) -> np.ndarray:
    """Return blocks of 64: signed zeros, subnormals, ties, huge values; and a tail."""
    rng = np.random.default_rng(7)
    blocks = rng.standard_normal((10, 64), np.float32)
    information = np.finfo(np.float32)
    ordered = np.sort(codebook)
    ties = (ordered[:-1] + ordered[1:]) / np.float32(2)
    blocks[0] = 0
    blocks[1] = -0.0
    blocks[2] = rng.integers(-9, 10, 64) * information.smallest_subnormal
    blocks[3] = np.clip(blocks[3], -1, 1) * information.tiny  # absmax around 2**-126
    blocks[4] = np.resize([1, *ties, *np.nextafter(ties, 2)], 64)
    blocks[5] = -np.resize([1, *ties, *np.nextafter(ties, 2)], 64)
    blocks[6, 5] = 3.0e38
    blocks[7] = np.resize([0.0, -0.0, 2.0], 64)
    blocks[8] *= np.float32(60000)  # beyond float16 when decoded
    flat = np.concatenate([blocks.reshape(-1), [np.float32(0.3)] * 5])
    with np.errstate(over="ignore"):
        cast = flat.astype(DTYPES[dtype])
    return np.where(np.isfinite(cast.astype(np.float32)), cast, 1).astype(cast.dtype)


def small(dtypes: Collection[str] = tuple(DTYPES)) -> None:
    """Run a few launches that reach every branch, for the slow checks."""
    for dtype in dtypes:
        agree(awkward(NF4, dtype), NF4, 64, [dtype])  # registers and shuffles
        agree(gaussian(2 * 2048 + 1001, dtype), FP4, 1024, [dtype])  # shared memory
        agree(gaussian(4096 + 77, dtype), NF3, 4096, [dtype])  # many tiles, 3 bits
        agree(gaussian(65, dtype), NF4, 2, [dtype])  # several blocks a thread
        agree(gaussian(8192 + 77, dtype), NF4, 32, [dtype])  # a whole tile


SYNC = "  __syncthreads();\n"
MUTATIONS = (
    Mutation("no barrier after the maxima", SYNC, "", 1, ("values", "races")),
    Mutation("no barrier after staging", SYNC, "", 2, ("values", "races")),
    Mutation(
        "a vector store one too far",
        "if (first + SIZE <= left)",
        "if (first < left)",
        1,
        ("addresses", "ptx"),
    ),
    Mutation(
        "a packed byte too many",
        "const i64 end = (n * bits + 7) / 8;",
        "const i64 end = (n * bits + 7) / 8 + 1;",
        1,
        ("addresses", "ptx"),
    ),
    Mutation(
        "swapped nibbles",
        "word[pass] >> (4 * i + 4) & 15, low = word[pass] >> 4 * i & 15",
        "word[pass] >> 4 * i & 15, low = word[pass] >> (4 * i + 4) & 15",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "another block's absmax",
        "part[warp / warps * warps + k]",
        "part[k]",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "a tie goes up",
        "x > midpoints[position + step - 1]",
        "x >= midpoints[position + step - 1]",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "the reciprocal of a subnormal",
        "absmax < 0x1p-126f ? 0x1p64f : 1.0f",
        "1.0f",
        1,
        ("values", "ptx"),
    ),
)
