"""The kernels that sum products, run on this CPU through their launchers."""

from types import SimpleNamespace

import numpy as np
import pytest

from minipeft import kernels
from minipeft.cupy import blockwise, dora, lora_batched, qlora
from minipeft.cupy.executor import use
from minipeft.errors import InputError
from tests.cuda.blockwise_cases import gaussian
from tests.cuda.executors import DTYPES, CpuExecutor
from tests.cuda.mutation import Mutation
from tests.cuda.product_cases import (
    Sizes,
    dora_agrees,
    gaussians,
    integers,
    lora_batched_agrees,
    qlora_agrees,
)
from tests.cuda.toolchain import compile_cpu, needs_cpu_build
from tests.tolerance import assert_bits

pytestmark = needs_cpu_build
DTYPE = pytest.mark.parametrize("dtype", DTYPES)
DRAW = pytest.mark.parametrize("draw", [integers, gaussians])


@DTYPE
@DRAW
@pytest.mark.parametrize(
    "s",
    [
        Sizes(1, 1, 1, 1),
        Sizes(7, 63, 65, 8),
        Sizes(4, 512, 300, 64),
        Sizes(9, 65, 7, 3),
    ],
)
def test_lora_batched(s, draw, dtype):
    with use(CpuExecutor()):
        lora_batched_agrees(s, dtype, draw, seed=s.d)


@DTYPE
@pytest.mark.parametrize("draw", [integers, gaussians])
@pytest.mark.parametrize(
    "s", [Sizes(1, 8, 1, 1), Sizes(4, 64, 65, 8), Sizes(9, 1032, 24, 16)]
)
def test_qlora(s, draw, dtype):
    with use(CpuExecutor()):
        qlora_agrees(s, dtype, draw, seed=s.d)
        if draw is gaussians:
            qlora_agrees(s, dtype, draw, nested=True, seed=s.d)


@DTYPE
@DRAW
@pytest.mark.parametrize(
    "s", [Sizes(0, 1, 1, 1), Sizes(0, 64, 65, 8), Sizes(0, 1031, 24, 16)]
)
def test_dora_row_norm(s, draw, dtype):
    with use(CpuExecutor()):
        dora_agrees(s, dtype, draw, seed=s.d)
        if dtype != "float32":
            dora_agrees(s, dtype, draw, seed=s.d, mixed=True)


SIXTEEN = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@SIXTEEN
@DRAW
def test_more_ranks_and_rows_than_one_product_of_tensor_cores(draw, dtype):
    with use(CpuExecutor()):
        dora_agrees(Sizes(0, 136, 40, 80), dtype, draw)
        dora_agrees(Sizes(0, 77, 33, 70), dtype, draw)
        dora_agrees(Sizes(0, 77, 33, 70), dtype, draw, mixed=True)
        qlora_agrees(Sizes(70, 264, 19, 4), dtype, draw)


def all_bits_agree(dtype: str, r: int) -> None:
    """Make each norm one entry of A or of B, with every bit of its three parts."""
    rng = np.random.default_rng(r)
    W = np.zeros((70, 40), DTYPES[dtype])
    for entries in (rng.standard_normal(70, np.float32), np.float32(0.1)):
        A, B = np.zeros((r, 40), np.float32), np.zeros((70, r), np.float32)
        k, j, one = rng.integers(0, r), rng.integers(0, 40), np.float32(1)
        A[k, j], B[:, k] = (one, entries) if np.ndim(entries) else (entries, one)
        assert_bits(
            dora.row_norm(W, A, B, 1.0), np.zeros(70, np.float32) + abs(entries)
        )


@SIXTEEN
@pytest.mark.parametrize("r", [1, 80])
def test_a_float32_factor_beside_16_bits_keeps_all_its_bits(r, dtype):
    with use(CpuExecutor()):
        all_bits_agree(dtype, r)


def test_factors_of_two_dtypes_are_refused():
    W, A, B = (np.zeros(s, np.float16) for s in [(5, 6), (2, 6), (5, 2)])
    wide = A.astype(np.float32)
    with use(CpuExecutor()):
        with pytest.raises(
            InputError, match=r"B is float16; give one of \['float32'\]"
        ):
            dora.row_norm(W, wide, B, 1.0)
        with pytest.raises(InputError, match=r"A is float16; give .* \['float32'\]"):
            dora.row_norm(W.astype(np.float32), A, B, 1.0)


# The mistakes of `rows` are planted in float32 code; these in code for tensor cores.
SHUFFLED = "__shfl_xor_sync(ALL_LANES, total, 2)"
MISTAKES = {
    "dora": {
        "swapped ranks": ("a[0].at[i], a[1].at[i]", "a[1].at[i], a[0].at[i]"),
        "other rows of B": ("row = g + 8 * (i % 2)", "row = g + 8 * (i / 2)"),
        "a lane too few in the sum": (SHUFFLED, "0.0f"),
    },
    "dora, mixed": {
        "a part too few": ("least = PIECES - 1", "least = PIECES - 2"),
        "a part twice": ("a[least - p]", "a[least]"),
        "the rows of B from the other half": ("TILE_ROWS * m + g", "TILE_ROWS - g"),
        "other columns of W": ("w[h].at[4 * s + i]", "w[h].at[s + 2 * i]"),
    },
    "qlora": {
        "rows and columns change places": ("i % 2 * 2 + h", "h * 2 + i % 2"),
        "another part of x": ("first[2] = {u.x, u.y}", "first[2] = {u.z, u.y}"),
        "a warp too few in the sum": ("k < WARPS; ++k)", "k < WARPS - 1; ++k)"),
    },
}


@pytest.mark.parametrize("row", MISTAKES)
def test_mistakes_on_tensor_cores_are_seen(row):
    file, *mixed = row.split(", ")
    text = kernels.source(file)
    mutants = {
        name: Mutation(name, old, new, 1, ()).apply(text)
        for name, (old, new) in MISTAKES[row].items()
    }
    built = compile_cpu(file, "values", mutants, ["float16"])
    seen = pytest.raises(AssertionError, match=r"differ, first at|off by")
    for name in mutants:
        with use(CpuExecutor("values", 0, {file: (built, name)})), seen:
            if file == "qlora":
                qlora_agrees(Sizes(9, 1032, 40, 16), "float16", integers)
            else:
                dora_agrees(
                    Sizes(9, 1032, 40, 16), "float16", integers, mixed=bool(mixed)
                )
                all_bits_agree("float16", 1)


def adapter(k=64, d=32, r=4):
    rng = np.random.default_rng(0)
    return SimpleNamespace(A=gaussians(rng, r, k), B=gaussians(rng, d, r), scaling=2.0)


def test_adapters_that_do_not_fit_are_refused():
    x, y = np.zeros((3, 64), np.float32), np.zeros((3, 32), np.float32)
    with use(CpuExecutor()):
        adapters = lora_batched.stack([adapter(), adapter(r=2)])
        with pytest.raises(InputError, match=r"row 1 asks for adapter 2; choose -1"):
            lora_batched.forward(x, y, adapters, [0, 2, 1])
        with pytest.raises(InputError, match=r"indices has shape \(2,\); x has 3 rows"):
            lora_batched.forward(x, y, adapters, [0, 1])
        with pytest.raises(InputError, match=r"y has shape \(2, 32\)"):
            lora_batched.forward(x, y[:2], adapters, [0, 1, 0])
        with pytest.raises(InputError, match="A is float32; give one of"):
            lora_batched.forward(x.astype(np.float16), y, adapters, [0, 1, 0])
        with pytest.raises(InputError, match=r"do not fit; stack the adapters"):
            lora_batched.forward(x[:, :32].copy(), y, adapters, [0, 1, 0])
        with pytest.raises(
            InputError, match="the rank is 300; the kernels take 1 to 256"
        ):
            lora_batched.forward(x, y, lora_batched.stack([adapter(r=300)]), [0, 0, 0])
        with pytest.raises(InputError, match="got adapters for 2"):
            lora_batched.stack([adapter(), adapter(k=32)])
        with pytest.raises(InputError, match="got adapters for 0"):
            lora_batched.stack([])


def test_a_base_that_does_not_fit_is_refused():
    x = np.zeros((3, 64), np.float32)
    with use(CpuExecutor()):
        q = blockwise.quantize(gaussian(32 * 64).reshape(32, 64))
        with pytest.raises(
            InputError, match=r"x has shape \(3, 32\); give \(tokens, 64\)"
        ):
            qlora.forward(x[:, :32].copy(), q)
        with pytest.raises(InputError, match="rows of a multiple of 8 values"):
            qlora.forward(x, blockwise.quantize(gaussian(630).reshape(10, 63)))
        with pytest.raises(InputError, match=r"bias has shape \(64,\); q has 32 rows"):
            qlora.forward(x, q, bias=x[0])
        with pytest.raises(InputError, match="got 2 adapters of 32 rows"):
            qlora.forward(x, q, lora_batched.stack([adapter(), adapter()]))


def test_norms_of_what_does_not_fit_are_refused():
    with use(CpuExecutor()), pytest.raises(InputError, match="do not fit; give"):
        dora.row_norm(*(np.zeros(s, np.float32) for s in [(4, 6), (2, 6), (5, 2)]), 1.0)
