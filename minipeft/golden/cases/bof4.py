"""Cases of bof4_quantize and bof4_dequantize: bytes, always."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from unittest.mock import patch

import numpy as np

from minipeft.golden.cases import Alternative, File, Spec, gaussian, reference
from minipeft.golden.cases.blockwise import search
from minipeft.golden.cases.build import either, given, refused
from minipeft.golden.tensors import Array, numpy_dtype
from minipeft.reference import blockwise, bof4
from minipeft.reference.bof4 import BOF4_S

PAPERS = ("https://arxiv.org/abs/2505.06653",)
F32 = np.float32
FROM_SAMPLES = np.array(
    [
        -0.8568463921546936,
        -0.6692874431610107,
        -0.5235266089439392,
        -0.4004882574081421,
        -0.2910638153553009,
        -0.1900092959403992,
        -0.0938529595732689,
        0.0,
        0.0887671709060669,
        0.1794802695512772,
        0.2743096053600311,
        0.3760197460651398,
        0.4886530041694641,
        0.6188603639602661,
        0.7791395783424377,
        1.0,
    ],
    F32,
)
"""The paper's table 6, BOF4-S of least squared error: the same optimum from samples."""


def files() -> Iterator[File]:
    """Yield the two files of the row."""
    yield File(
        operation="bof4_quantize",
        header=(
            "a = the value of a block with the largest absolute value, the first if",
            "there are two; W * (1/a) in float32 to the nearest of 16 values, a tie to",
            "the lower; two codes in a byte, the first one high.",
        ),
        source="minipeft.reference.bof4.quantize",
        papers=PAPERS,
        specs=[*map(_or_from_samples, _quantize())],
    )
    yield File(
        operation="bof4_dequantize",
        header=("W = the code's value * a, in float32, then one rounding.",),
        source="minipeft.reference.bof4",
        papers=PAPERS,
        specs=[*map(_or_from_samples, _dequantize())],
    )


def _quantize() -> Iterator[Spec]:
    yield _spec("two blocks, normal values", "Basic", gaussian("bof4", (2, 64)))
    W = gaussian("bof4 weights", (3, 40), 0.02)
    yield _spec("rows of 40 in blocks of 64", "Basic FlattenRowMajor", W)
    yield _spec("every value of the codebook, a = 1", "EveryCode", BOF4_S)
    yield _spec("the same, a = -1", "EveryCode NegativeAbsmax", -BOF4_S)
    yield _spec("the same, a = -pi", "EveryCode NegativeAbsmax", BOF4_S * -F32(np.pi))
    for values in ([2, -2, 1], [-2, 2, 1]):
        W = np.array(values, F32)
        yield _spec(f"{values}: two are the largest", "FirstLargest OddLength", W)
    middle = (BOF4_S[:-1] + BOF4_S[1:]) / 2
    yield _spec("every midpoint", "Tie", np.append(middle, F32(1)))
    yield _spec("negated midpoints", "Tie NegativeAbsmax", np.append(-middle, F32(-1)))
    W = np.concatenate([np.zeros(64, F32), gaussian("bof4 zero", (8,))])
    yield _spec("a block of zeros", "ZeroBlock ShortBlock", W)
    W = np.linspace(-1, 1, 16, dtype=F32) * F32(-9e-39)
    yield _spec("a = 9e-39", "Subnormal", W)
    fine = _spec("", "", np.ones(8, F32))
    for bad in (np.nan, -np.inf):
        W = np.array([1, bad], F32)
        yield refused(fine, f"W holds {bad}", "NotFinite", W=W)
    yield refused(fine, "blocks of 48", "InvalidBlocksize", blocksize=48)
    yield from _other_blocks()
    yield from _lifted()
    yield _both_sides("both sides of every midpoint", BOF4_S)
    yield _both_sides("the same of the paper's table", FROM_SAMPLES)


def _both_sides(comment: str, table: Array) -> Spec:
    """One step below and above each midpoint, in one answer: no table is half another.

    Whether the midpoint itself is exact depends on how it is compared.
    """
    middle = search.midpoints(table)
    sides = [search.step(middle, -1), search.step(middle, 1), np.ones(1, F32)]
    return _spec(comment, "NextToTie OddLength", np.concatenate(sides))


def _lifted() -> Iterator[Spec]:
    ramp = np.linspace(-0.9, 1, 16, dtype=F32)
    yield _spec("a = -1e-42", "Subnormal NegativeAbsmax", ramp * F32(-1e-42))
    W = search.lift_differs(BOF4_S, 3)
    yield _spec("a lift by no power of two, 3 times another code", "Subnormal", W)
    for power in (64, 125):
        W = ramp * F32(1.5 * 2.0**power)
        yield _spec(f"a = 1.5 * 2**{power}", "LiftedAbsmax", W)
    yield _spec("a = -1.5 * 2**125", "LiftedAbsmax NegativeAbsmax", -W)
    yield _divided("W/a has another code, 8 times")


def _other_blocks() -> Iterator[Spec]:
    for blocksize, size in ((1, 6), (4, 10), (32, 96), (128, 160)):
        W = gaussian(f"bof4 blocks of {blocksize}", (size,))
        yield _spec(f"blocks of {blocksize}", "BlockBoundary", W, blocksize)
    W = gaussian("bof4 large block", (130,))
    yield _spec("130 values in a block of 4096", "LargeBlock ShortBlock", W, 4096)
    for dtype in ("float16", "bfloat16"):
        yield _spec(f"{dtype} weights", "HalfInput", _sensitive(dtype))
    yield _spec("9 values", "ShortBlock OddLength", gaussian("bof4 9", (9,)))


def _sensitive(dtype: str) -> Array:
    """Return weights whose codes change when they are scaled in their own dtype."""
    for attempt in count():
        W = gaussian(f"bof4 {dtype} {attempt}", (64,), dtype=numpy_dtype(dtype))
        largest = W[np.abs(W).argmax()]
        coarse = blockwise.nearest((W / largest).astype(F32), BOF4_S)
        scaled = W.astype(F32) * (F32(1) / F32(largest))
        if (blockwise.nearest(scaled, BOF4_S) != coarse).any():
            return W
    raise AssertionError("unreachable: attempts never end")


def _divided(comment: str) -> Spec:
    W = search.division_differs(BOF4_S, 8)
    codes = blockwise.nearest(W / W[0], BOF4_S)
    theirs = {"packed": blockwise.pack(codes, 4, fill=7), "absmax": W[:1]}
    spec = _spec(comment, "ReciprocalMultiply OddLength", W)
    return either(spec, Alternative("division", theirs))


def _dequantize() -> Iterator[Spec]:
    table = np.arange(16, dtype=np.uint8)
    yield _decode("all codes, a = 1", "Table", table, [1])
    yield _decode("all codes, a = -0.3", "Table NegativeAbsmax", table, [-0.3])
    codes = np.tile(table, 9)[:130]
    scales = [0.5, -3, 7]
    yield _decode(
        "130 values: the last block is two", "Basic ShortBlock", codes, scales
    )
    for dtype in ("float16", "bfloat16"):
        yield _decode(f"to {dtype}", "RoundOnce", table, [np.pi], dtype)
    fine = _decode("", "", table, [1])
    two = np.ones(2, F32)
    yield refused(fine, "a scale too many", "ShapeMismatch", absmax=two)
    for blocksize, size in ((1, 6), (4, 10), (32, 96)):
        some = np.linspace(-2, 3, -(-size // blocksize)).tolist()
        spec = _decode(f"blocks of {blocksize}", "BlockBoundary", codes[:size], some)
        yield replace(spec, parameters={**spec.parameters, "blocksize": blocksize})
    odd = _decode("65 values", "ShortBlock OddLength", codes[:65], [-2, 0.7])
    yield odd
    spare = odd.inputs["packed"].copy()
    spare[-1] &= 0xF0
    comment = "65 values, the spare code is 0"
    yield replace(given(odd, packed=spare), comment=comment)


def _or_from_samples(spec: Spec) -> Spec:
    """Accept what the paper's table gives, where that is another answer."""
    if spec.result not in ("valid", "acceptable"):
        return spec
    operation = "bof4_quantize" if "W" in spec.inputs else "bof4_dequantize"
    ours = reference(operation, spec.inputs, spec.parameters)
    with patch.object(bof4, "BOF4_S", FROM_SAMPLES):
        theirs = reference(operation, spec.inputs, spec.parameters)
    same = all(np.array_equal(ours[name], theirs[name]) for name in ours)
    return spec if same else either(spec, Alternative("codes-from-samples", theirs))


def _spec(comment: str, flags: str, W: Array, blocksize: int = 64) -> Spec:
    return Spec(comment, tuple(flags.split()), {"W": W}, {"blocksize": blocksize})


def _decode(
    comment: str, flags: str, codes: Array, scales: list[float], dtype: str = "float32"
) -> Spec:
    inputs = {
        "packed": blockwise.pack(codes, 4, fill=7),
        "absmax": np.array(scales, F32),
    }
    parameters = {"blocksize": 64, "shape": [len(codes)], "dtype": dtype}
    return Spec(comment, tuple(flags.split()), inputs, parameters)
