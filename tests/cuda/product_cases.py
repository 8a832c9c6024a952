"""Cases of the kernels that sum products, for every check: lora_batched, qlora, dora.

Equality has two meanings here. With small integers and power-of-two scalings every
partial sum is exact, so the kernel gives the reference's bits whatever its order of
summation. With normal numbers the result lies within the bound of its roundings.
"""

from collections.abc import Collection
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from minipeft.cupy import dora, lora_batched, qlora
from minipeft.cupy.blockwise import Blockwise
from minipeft.cupy.double_quant import Nested
from minipeft.reference import blockwise, double_quant
from minipeft.reference.codebook import NF4
from tests.cuda.executors import DTYPES
from tests.cuda.mutation import Mutation
from tests.tolerance import assert_bits, assert_within, gamma, matmul_bound

# Codes whose values are small integers over 8: with a power of two as absmax all
# products are exact.
EIGHTHS = (np.arange(16, dtype=np.float32) - 8) / np.float32(8)


@dataclass(frozen=True)
class Sizes:
    tokens: int
    k: int
    d: int
    r: int


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-2, 3, shape).astype(np.float32)


def gaussians(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def rounding(exact: np.ndarray, bound: np.ndarray, dtype: str) -> np.ndarray:
    """Widen a bound by one rounding to the dtype of the result."""
    return (
        bound if dtype == "float32" else bound + gamma(1, dtype) * (abs(exact) + bound)
    )


def roundings(n: int, dtype: str) -> int:
    """Return n, doubled in 16 bits, where tensor cores add.

    PTX promises no rounding to nearest for tensor cores, so a sum may err by a whole
    last bit of float32, twice the unit roundoff that `gamma` counts with.
    """
    return n if dtype == "float32" else 2 * n


def wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(array, np.float64) for array in arrays]


# lora_batched


def lora_batched_agrees(s: Sizes, dtype: str, draw, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    x, y = (draw(rng, s.tokens, n).astype(DTYPES[dtype]) for n in (s.k, s.d))
    loras = [
        SimpleNamespace(A=draw(rng, r, s.k), B=draw(rng, s.d, r), scaling=scaling)
        for r, scaling in ((s.r, 0.5), (max(1, s.r // 2), 2.0), (s.r, 0.25))
    ]
    indices = rng.integers(-1, 3, s.tokens)
    adapters = lora_batched.stack(loras, dtype)
    got = lora_batched.forward(x, y, adapters, indices)
    for t, i in enumerate(indices):
        if i < 0:
            assert_bits(got[t], y[t])
            continue
        A, B, row, base = wide(adapters.A[i], adapters.B[i], x[t], y[t])
        factor = float(adapters.scaling[i])
        exact = base + factor * (row @ A.T @ B.T)
        if draw is integers:
            assert_bits(got[t], exact.astype(got.dtype))
        else:
            # in + r products and sums, the scaling, the sum with y.
            update = abs(factor) * matmul_bound(row, A.T, B.T, roundings=s.k + s.r + 2)
            bound = update + gamma(1) * abs(base)
            assert_within(got[t], exact, rounding(exact, bound, dtype))


def lora_batched_small(dtypes: Collection[str] = tuple(DTYPES)) -> None:
    for dtype in dtypes:
        for draw in (integers, gaussians):
            lora_batched_agrees(Sizes(5, 264, 272, 16), dtype, draw)
            lora_batched_agrees(Sizes(3, 77, 13, 5), dtype, draw)  # no vectors


# qlora


def base(rng, s: Sizes, draw, nested: bool):
    """Quantize a base; return the reference's tensor and the kernel's."""
    W = draw(rng, s.d, s.k)
    if draw is integers:
        codes = rng.integers(0, 16, s.d * s.k, np.uint8)
        absmax = np.full(-(-s.d * s.k // 32), 8, np.float32)
        packed = blockwise.pack(codes, 4)
        q = blockwise.Blockwise(packed, absmax, EIGHTHS, 32, W.shape)
        return q, Blockwise(packed, absmax, EIGHTHS, 32, W.shape)
    if nested:
        q = double_quant.quantize(W, NF4, 32, 64)
        return q, Nested(**{**vars(q), "offset": np.array(q.offset)})
    q = blockwise.quantize(W, NF4, 32)
    return q, Blockwise(**vars(q))


def qlora_agrees(
    s: Sizes, dtype: str, draw, nested: bool = False, seed: int = 0
) -> None:
    rng = np.random.default_rng(seed)
    q, parts = base(rng, s, draw, nested)
    x = draw(rng, s.tokens, s.k).astype(DTYPES[dtype])
    bias = draw(rng, s.d).astype(DTYPES[dtype])
    decode = double_quant.dequantize if nested else blockwise.dequantize
    lora = SimpleNamespace(A=draw(rng, s.r, s.k), B=draw(rng, s.d, s.r), scaling=0.5)
    adapter = lora_batched.stack([lora], dtype)
    W, A, B, x64, b = wide(decode(q, x.dtype), adapter.A[0], adapter.B[0], x, bias)
    plain = x64 @ W.T
    for got, exact, factor in (
        (qlora.forward(x, parts), plain, 0),
        (
            qlora.forward(x, parts, adapter, bias),
            plain + 0.5 * (x64 @ A.T @ B.T) + b,
            0.5,
        ),
    ):
        if draw is integers:
            assert_bits(got, exact.astype(got.dtype))
            continue
        # Products and sums, the tree of the warp, scaling and bias.
        n = roundings(s.k + s.r + 8, dtype)
        bound = matmul_bound(x64, W.T, roundings=n) + gamma(1) * abs(b)
        bound += factor * matmul_bound(x64, A.T, B.T, roundings=n + s.k)
        assert_within(got, exact, rounding(exact, bound, dtype))


def qlora_small(dtypes: Collection[str] = tuple(DTYPES)) -> None:
    for dtype in dtypes:
        qlora_agrees(Sizes(1, 264, 19, 4), dtype, integers)
        qlora_agrees(Sizes(5, 264, 9, 3), dtype, gaussians)
        qlora_agrees(Sizes(2, 520, 8, 33), dtype, gaussians, nested=True)


# dora


def dora_agrees(s: Sizes, dtype: str, draw, seed: int = 0, mixed: bool = False) -> None:
    """Compare norms; `mixed`: of A and B in float32."""
    rng = np.random.default_rng(seed)
    factors = "float32" if mixed else dtype
    W, A, B = (
        draw(rng, *shape).astype(DTYPES[kind])
        for kind, shape in (
            (dtype, (s.d, s.k)),
            (factors, (s.r, s.k)),
            (factors, (s.d, s.r)),
        )
    )
    if draw is gaussians:
        W[0] = 0
        B[0] = 0  # a zero row
    got = dora.row_norm(W, A, B, 0.5)
    W, A, B = wide(W, A, B)
    V = W + 0.5 * B @ A
    exact = np.sqrt((V * V).sum(axis=1))
    if draw is integers:
        assert_bits(got, exact.astype(np.float32))
        return
    # The norm of a row changes by at most the norm of the row's change; then come the
    # norm's own sums.
    # Of factors that are split, six of nine products are added for each rank: their
    # absolute values add up to less than 7/6 of the product of the numbers, and the
    # other three to 2**-23 of it, two roundings and a little.
    sums, left_out = (7 * s.r, 3) if mixed else (s.r, 0)
    n = roundings(sums + 2, dtype) + left_out
    moved = gamma(n) * (abs(W) + 0.5 * abs(B) @ abs(A))
    row = np.sqrt((moved * moved).sum(axis=1))
    assert_within(got, exact, row + gamma(s.k + 2) * (exact + row))


def dora_small(dtypes: Collection[str] = tuple(DTYPES)) -> None:
    for dtype in dtypes:
        for draw in (integers, gaussians):
            for mixed in (False, True)[: 1 + (dtype != "float32")]:
                dora_agrees(Sizes(0, 264, 11, 4), dtype, draw, mixed=mixed)
                dora_agrees(Sizes(0, 77, 9, 3), dtype, draw, mixed=mixed)  # no vectors


# Mistakes

LORA_BATCHED_MUTATIONS = (
    Mutation(
        "no barrier after loading h", "  __syncthreads();\n", "", 1, ("values", "races")
    ),
    Mutation(
        "an output too many",
        "if (o >= out_features) return;",
        "if (o > out_features) return;",
        1,
        ("addresses", "ptx"),
    ),
    Mutation(
        "everybody's adapter is the first",
        "B + (i64(adapter) * out_features + o) * r",
        "B + (i64(adapter * 0) * out_features + o) * r",
        1,
        ("values", "ptx"),
    ),
)
QLORA_MUTATIONS = (
    Mutation(
        "no barrier after the table", "  __syncthreads();\n", "", 1, ("values", "races")
    ),
    Mutation(
        "an output too many",
        "first + 1 < out_features ? first + 1 : first;",
        "first + 1;",
        1,
        ("addresses", "ptx"),
    ),
    Mutation(
        "swapped nibbles",
        "first = word >> 2 & 0x3c3c3c3c, second = word << 2 & 0x3c3c3c3c",
        "first = word << 2 & 0x3c3c3c3c, second = word >> 2 & 0x3c3c3c3c",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "another block's absmax",
        "(row[p].rest + j + s * STRETCH) >> log2_blocksize)",
        "(row[p].rest + j + s * STRETCH) >> log2_blocksize >> 1)",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "a lane too few in the sum",
        "distance = WARP / 2",
        "distance = WARP / 4",
        2,
        ("values", "ptx"),
    ),
)
DORA_MUTATIONS = (
    Mutation(
        "a row too many",
        "threadIdx.x >= BLOCK_ROWS || o >= out_features",
        "threadIdx.x >= BLOCK_ROWS || o > out_features",
        1,
        ("addresses", "ptx"),
    ),
    Mutation(
        "another row of A",
        "load_columns<WHOLE, SIZE>(A, j,",
        "load_columns<WHOLE, SIZE>(A - k / 2 * in_features, j,",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "two rows write one norm",
        "norm[o] = __fsqrt_rn(total);",
        "norm[o / 2] = __fsqrt_rn(total);",
        1,
        ("values", "races", "ptx"),
    ),
)
