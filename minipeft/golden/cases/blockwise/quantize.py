"""Cases of nf4_quantize and fp4_quantize."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from minipeft.golden.cases import POLICIES, Alternative, File, Spec, gaussian, reference
from minipeft.golden.cases.blockwise import peers, search
from minipeft.golden.cases.build import either
from minipeft.golden.tensors import Array
from minipeft.reference.codebook import FP4, NF4

PAPERS = ("https://arxiv.org/abs/2305.14314",)

F32 = np.float32
LARGEST = np.finfo(F32).max
SMALLEST = F32(2.0**-149)
NORMAL = np.finfo(F32).tiny


def nf4() -> File:
    """Return the cases of nf4_quantize."""
    return File(
        operation="nf4_quantize",
        header=(
            "NF4 in blocks: absmax of each block, W * (1/absmax) in float32, the",
            "nearest of 16 values by float32 midpoints, two codes in a byte, the",
            "first one high.",
        ),
        source="minipeft.reference.blockwise.quantize",
        papers=PAPERS,
        specs=[
            _latitude("nf4_quantize", NF4, spec)
            for spec in (*_common(NF4), *_later(NF4))
        ],
    )


def fp4() -> File:
    """Return the cases of fp4_quantize."""
    specs = [*_common(FP4), *_fp4_only(), *_later(FP4)]
    return File(
        operation="fp4_quantize",
        header=(
            "FP4 in blocks: as nf4_quantize, with the codebook of a sign, two exponent",
            "bits and a mantissa bit, divided by 12: not in ascending order of codes.",
        ),
        source="minipeft.reference.blockwise.quantize",
        papers=PAPERS,
        specs=[_latitude("fp4_quantize", FP4, spec) for spec in specs],
    )


def _common(codebook: Array) -> Iterator[Spec]:
    yield from _basic(codebook)
    yield from _ends(codebook)
    yield from _zeros()
    yield from _ties(codebook)
    yield from _extremes()
    yield from _rounding(codebook)
    yield from _block_sizes(codebook)
    yield from _invalid()


def _spec(comment: str, flags: str, W: Array, blocksize: int = 64) -> Spec:
    return Spec(comment, tuple(flags.split()), {"W": W}, {"blocksize": blocksize})


def _draw(codebook: Array, seed: str, shape: tuple[int, ...], std: float = 1) -> Array:
    W = gaussian(seed, shape, std)
    if codebook is FP4:  # its two zeros have cases of their own
        W = np.where(np.abs(W) < std / 25, F32(std / 4), W)
    return W


def _basic(codebook: Array) -> Iterator[Spec]:
    yield _spec("two blocks, normal values", "Basic", _draw(codebook, "a", (2, 64)))
    W = _draw(codebook, "b", (64,), 0.02)
    yield _spec("values of the size of a model's weights", "Basic", W)
    yield _spec("three axes", "Basic FlattenRowMajor", _draw(codebook, "c", (2, 2, 16)))
    W = _draw(codebook, "d", (3, 40))
    yield _spec("rows of 40 in blocks of 64", "FlattenRowMajor", W)
    yield _spec("one column", "FlattenRowMajor", _draw(codebook, "e", (8, 1)))
    yield _spec("-1 then 1", "NibbleOrder ShortBlock", _row(-1, 1))
    yield _spec("1 then -1", "NibbleOrder ShortBlock", _row(1, -1))
    yield _spec("1, 0, 0, -1", "NibbleOrder ShortBlock", _row(1, 0, 0, -1))
    W = np.concatenate([codebook, -codebook, codebook[::-1], -codebook[::-1]])
    yield _spec("every value of the codebook, at absmax 1", "EveryCode", W)
    yield _spec("the same at absmax pi", "EveryCode", W * F32(np.pi))


def _ends(codebook: Array) -> Iterator[Spec]:
    long = _draw(codebook, "ends", (80,))
    yield _spec("80 values: a block of 64 and one of 16", "ShortBlock", long)
    yield _spec(
        "65 values: the last block is one value", "OddLength PadNibble", long[:65]
    )
    yield _spec("5 values", "ShortBlock OddLength PadNibble", long[:5])
    yield _spec("one positive value", "SingleElement OddLength PadNibble", _row(0.37))
    yield _spec("one negative value", "SingleElement OddLength PadNibble", _row(-2.5))
    W = _row(0.37).reshape(1, 1)
    yield _spec("one value, two axes", "SingleElement OddLength PadNibble", W)
    W = _row(0.5, -2).reshape(2, 1)
    yield _spec("two rows of one value", "FlattenRowMajor ShortBlock", W)
    for shape in ((0,), (0, 64)):
        spec = _spec(f"shape {list(shape)}", "Empty", np.zeros(shape, F32))
        refuses = Alternative("refuses-empty", None)
        yield replace(spec, result="acceptable", alternatives=(refuses,))


def _zeros() -> Iterator[Spec]:
    zero, ones = np.zeros(64, F32), np.where(np.arange(64) % 3, F32(0.5), F32(-1))
    yield _spec("one block of zeros", "ZeroBlock", zero)
    W = np.concatenate([ones, zero, ones[:8]])
    yield _spec("zeros between two other blocks", "ZeroBlock", W)
    yield _spec("-0.0 throughout", "ZeroBlock NegativeZero ShortBlock", -zero[:16])
    W = np.concatenate([ones, zero[:8]])
    yield _spec("zeros in a short last block", "ZeroBlock ShortBlock", W)
    yield _spec("one zero", "ZeroBlock SingleElement PadNibble", _row(0))
    W = np.tile(_row(0.0, -0.0, 1.0, -0.0), 4)
    yield _spec("0.0 and -0.0 beside 1.0", "NegativeZero ShortBlock", W)


def _ties(codebook: Array) -> Iterator[Spec]:
    ties = search.midpoints(codebook)
    yield _spec("every midpoint", "Tie", _fill(F32(1), ties))
    if codebook is not FP4:  # which has the same midpoints on both sides
        yield _spec("the midpoints, negated", "Tie", _fill(F32(1), -ties))
        yield _spec("every midpoint, absmax 4", "Tie", _fill(F32(-4), ties * F32(4)))
    for count in (1, -1):
        where = "above" if count > 0 else "below"
        W = _fill(F32(1), search.step(ties, count))
        yield _spec(f"one step {where} every midpoint", "NextToTie", W)
    flags = "Tie ReciprocalMultiply"
    W = search.scaled_ties(codebook, 8)
    yield _spec("midpoints after scaling", flags, _fill(W[0], W[1:]))


def _extremes() -> Iterator[Spec]:
    ramp = np.linspace(-1, 1, 64, dtype=F32)
    yield _spec("absmax negative", "NegativeAbsmax", _fill(F32(-3), ramp[8:56]))
    yield _spec("all 0.1", "Constant", np.full(64, 0.1, F32))
    W = np.where(np.arange(16) == 9, F32(1e4), F32(1e-2))
    yield _spec("one outlier", "Outlier ShortBlock", W)
    yield _spec("the largest float32", "LargeAbsmax", ramp * LARGEST)
    yield _spec("the smallest normal float32", "Subnormal", ramp * NORMAL)
    yield _spec("absmax 9e-39", "Subnormal", ramp * F32(9e-39))
    yield _spec("absmax 1e-42", "Subnormal", ramp * F32(1e-42))
    W = np.where(np.arange(64) % 2, SMALLEST, -SMALLEST)
    yield _spec("the two smallest values there are", "Subnormal", W)
    yield _spec("the smallest value and zeros", "Subnormal", _fill(SMALLEST, ramp[:0]))
    W = np.concatenate([ramp, ramp[:8] * F32(1e-40)])
    yield _spec("a short last block, subnormal", "Subnormal ShortBlock", W)


def _rounding(codebook: Array) -> Iterator[Spec]:
    flags = "ReciprocalMultiply"
    W = search.division_differs(codebook, 8)
    yield _spec("W/absmax has another code, 8 times", flags, _fill(W[0], W[1:]))
    yield _spec("the same in a short block", f"{flags} ShortBlock", W[:8])
    scales = search.short_of_one(2)
    W = np.concatenate([_fill(a, _row(-a)) for a in scales])[:72]
    yield _spec("absmax * (1/absmax) < 1", "AbsmaxReciprocal", W)
    for dtype in (np.dtype(np.float16), np.dtype(bfloat16)):
        W = search.half_scaling_differs(codebook, 64, dtype)
        yield _spec(f"{dtype} weights, sensitive to the precision", "HalfInput", W)
    W = np.linspace(-65504, 65504, 32).astype(np.float16)
    yield _spec("float16 up to its largest value", "HalfInput ShortBlock", W)
    W = np.linspace(-6e-5, 6e-5, 32).astype(np.float16)
    yield _spec("float16, all subnormal", "HalfInput ShortBlock", W)


def _block_sizes(codebook: Array) -> Iterator[Spec]:
    W = _draw(codebook, "sizes", (1024,)).astype(bfloat16)
    yield _spec("blocks of 32", "BlockBoundary HalfInput", W[:96], 32)
    yield _spec("blocks of 128", "BlockBoundary HalfInput", W[:160], 128)
    yield _spec("one block of 256", "BlockBoundary HalfInput", W[:256], 256)
    yield _spec("blocks of 4", "BlockBoundary HalfInput", W[:10], 4)
    yield _spec("blocks of 1", "BlockBoundary HalfInput", W[:6], 1)
    yield _spec("one block of 1024", "LargeBlock HalfInput", W, 1024)
    flags = "LargeBlock HalfInput ShortBlock"
    yield _spec("260 values in a block of 4096", flags, W[:260], 4096)


def _invalid() -> Iterator[Spec]:
    W = np.linspace(-1, 1, 72, dtype=F32)
    yield _refuse("NaN in a block", "NotFinite", _put(W[:64], 5, np.nan), 64)
    yield _refuse("infinity", "NotFinite", _put(W[:16], 6, np.inf), 64)
    yield _refuse("-infinity", "NotFinite", _put(W[:16], 7, -np.inf), 64)
    yield _refuse("NaN in a short last block", "NotFinite", _put(W, 70, np.nan), 64)
    yield _refuse("NaN alone", "NotFinite SingleElement", _row(np.nan), 64)
    half = _put(W[:16].astype(np.float16), 15, np.inf)
    yield _refuse("infinity in float16", "NotFinite HalfInput", half, 64)
    for blocksize in (0, 3, -64):
        comment = f"a block size of {blocksize}"
        yield _refuse(comment, "InvalidBlocksize", W[:8], blocksize)


def _later(codebook: Array) -> Iterator[Spec]:
    ramp = np.linspace(-1, 1, 64, dtype=F32)
    for power in (64, 100, 125):
        comment = f"absmax 2**{power} times 1.5"
        yield _spec(comment, "LiftedAbsmax", ramp * F32(1.5 * 2.0**power))
    yield _spec(
        "9 values", "ShortBlock OddLength PadNibble", _draw(codebook, "9", (9,))
    )
    W = search.lift_differs(codebook, 3)
    comment = "a lift by no power of two has another code, 3 times"
    yield _spec(comment, "Subnormal", W)


def _fp4_only() -> Iterator[Spec]:
    small = _row(0.001, -0.001, 0.0026, -0.0026, 0.003, -0.003, 0, -0.0)
    yield _spec("values near zero", "FP4TwoZeros", _fill(F32(1), small))
    W = gaussian("two zeros", (64,))
    yield _spec("normal values, some near zero", "FP4TwoZeros", W)


def _latitude(operation: str, codebook: Array, spec: Spec) -> Spec:
    """Allow what others answer by rules of their own."""
    if spec.result != "valid":
        return spec
    W, blocksize = spec.inputs["W"], spec.parameters["blocksize"]
    ours = reference(operation, spec.inputs, spec.parameters)
    names = tuple(ours)
    for name, parts in peers.ways(W, codebook, blocksize):
        if all(
            a.tobytes() == b.tobytes()
            for a, b in zip(parts, ours.values(), strict=True)
        ):
            continue
        if name == "fp4-by-magnitude" and "FP4TwoZeros" not in spec.flags:
            spec = replace(spec, flags=(*spec.flags, "FP4Tie"))
        theirs = dict(zip(names, parts, strict=True))
        spec = either(spec, Alternative(name, theirs))
    return spec


def _refuse(comment: str, flags: str, W: Array, blocksize: int) -> Spec:
    result = "policy" if POLICIES & set(flags.split()) else "invalid"
    return replace(_spec(comment, flags, W, blocksize), result=result)


def _row(*values: Any) -> Array:
    return np.array(values, F32)


def _put(W: Array, index: int, value: float) -> Array:
    changed = W.copy()
    changed[index] = value
    return changed


def _fill(absmax: Any, values: Array) -> Array:
    """Return a block of 64: the absmax first, then the values, then zeros."""
    block = np.zeros(64, F32)
    block[0] = absmax
    block[1 : 1 + len(values)] = values
    return block
