"""Cases of the AdamW kernels for every check: some steps, all bits compared."""

from collections.abc import Collection

import numpy as np

from minipeft.cupy import adamw as gpu
from minipeft.reference import adamw as reference
from tests.cuda.blockwise_cases import gaussian
from tests.cuda.executors import DTYPES
from tests.cuda.mutation import Mutation
from tests.tolerance import assert_bits

CONFIG = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def agree(n: int, dtype: str, bits: int, steps: int = 3) -> None:
    """Take steps with the launchers and with the reference, and compare all bytes."""
    W = expected_W = gaussian(n, dtype)
    state, expected = gpu.init(W, bits), reference.init(W, bits)
    agreeing(state, expected)
    for t in range(steps):
        grad = slope(n, dtype, t)
        W, state = gpu.step(W, grad, state, gpu.AdamW(**CONFIG))
        expected_W, expected = reference.step(
            expected_W, grad, expected, reference.AdamW(**CONFIG)
        )
        assert_bits(W, expected_W)
        agreeing(state, expected)


def agreeing(state, expected) -> None:
    """Compare the steps taken and all bytes of both moments."""
    assert state.t == expected.t
    for moment in ("m", "v"):
        same(getattr(state, moment), getattr(expected, moment))


def same(moment, expected) -> None:
    if isinstance(moment, np.ndarray):
        assert_bits(moment, expected)
    else:
        assert_bits(moment.packed, expected.packed)
        assert_bits(moment.absmax, expected.absmax)


def slope(n: int, dtype: str, t: int) -> np.ndarray:
    """Return gradients of uneven size, with zeros and a block of zeros."""
    rng = np.random.default_rng([n, t])
    size = np.float32(10) ** rng.integers(-4, 2, n).astype(np.float32)
    grad = rng.standard_normal(n, np.float32) * size
    grad[::7] = 0
    grad[256:512] = 0
    return grad.astype(DTYPES[dtype])


def small(dtypes: Collection[str] = tuple(DTYPES)) -> None:
    """Run a few launches that reach every branch, for the slow checks."""
    for dtype in dtypes:
        agree(2049, dtype, 32, steps=2)
        # Float32: two CUDA blocks, the last of two tiles; the last tile of 77 values.
        tiles = 9 if dtype == "float32" else 4
        agree(tiles * 1024 + 77, dtype, 8, steps=2)


SYNC = "  __syncthreads();\n"
MUTATIONS = (
    Mutation("no barrier after the tables", SYNC, "", 1, ("values", "races")),
    Mutation(
        "every lane writes the scale",
        "if (lane == 0) {",
        "{",
        1,
        ("races",),
    ),
    Mutation(
        "a vector store one too far",
        "if (WHOLE || first + GROUP <= n) {",
        "if (WHOLE || first < n) {",
        1,
        ("addresses", "ptx"),
    ),
    Mutation(
        "a neighbour's absmax",
        "m_before = t.m_absmax[block]",
        "m_before = t.m_absmax[block / 2]",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "half a block's maximum",
        "v_scale = warp_max(v_scale);",
        "",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "v from the new gradient only",
        "__fmul_rn(beta2, v)",
        "__fmul_rn(beta2, square)",
        1,
        ("values", "ptx"),
    ),
)
