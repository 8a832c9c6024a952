"""Cases of nf4_dequantize and fp4_dequantize."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from minipeft.golden.cases import Alternative, File, Spec, gaussian, reference
from minipeft.golden.cases.blockwise import search
from minipeft.golden.cases.blockwise.quantize import PAPERS
from minipeft.golden.tensors import Array
from minipeft.reference import blockwise
from minipeft.reference.codebook import FP4, NF4

F32 = np.float32
HALF = ("float16", "bfloat16")
TABLE = np.arange(16, dtype=np.uint8)
COMMON = np.delete(TABLE, 8)  # FP4's second zero has cases of its own


def nf4() -> File:
    """Return the cases of nf4_dequantize."""
    return File(
        operation="nf4_dequantize",
        header=(
            "NF4 in blocks, read back: code's value * absmax of its block in float32,",
            "then one rounding to the output's dtype, to nearest, ties to even.",
        ),
        source="minipeft.reference.blockwise.dequantize",
        papers=PAPERS,
        specs=[
            *(_latitude("nf4_dequantize", spec) for spec in _common(NF4)),
            *_too_many(),
        ],
    )


def fp4() -> File:
    """Return the cases of fp4_dequantize."""
    return File(
        operation="fp4_dequantize",
        header=(
            "FP4 in blocks, read back: as nf4_dequantize, with the codebook of a sign,",
            "two exponent bits and a mantissa bit, divided by 12.",
        ),
        source="minipeft.reference.blockwise.dequantize",
        papers=PAPERS,
        specs=[_latitude("fp4_dequantize", spec) for spec in _common(FP4)],
    )


def _common(codebook: Array) -> Iterator[Spec]:
    yield from _basic()
    yield from _misaligned()
    yield from _ends()
    yield from _dtypes(codebook)
    yield from _scales()
    yield from _block_sizes()
    yield from _invalid()


def _spec(
    comment: str,
    flags: str,
    codes: Array,
    absmax: Sequence[Any] | Array,
    blocksize: int = 64,
    shape: tuple[int, ...] = (),
    dtype: str = "float32",
) -> Spec:
    parameters = {"blocksize": blocksize, "shape": list(shape or codes.shape)}
    return Spec(
        comment,
        tuple(flags.split()),
        {"packed": blockwise.pack(codes, 4), "absmax": np.asarray(absmax, F32)},
        parameters | {"dtype": dtype},
    )


def _basic() -> Iterator[Spec]:
    yield _spec("all codes, absmax 1", "Table", np.tile(TABLE, 4), [1])
    yield _spec("all codes, absmax 0.3", "Table", TABLE, [0.3])
    yield _spec("all codes, absmax -1", "Table", TABLE, [-1])
    yield _random("two blocks", "Basic", (2, 64))
    yield _random("three axes", "Basic FlattenRowMajor", (2, 2, 16))
    yield _random("one column", "FlattenRowMajor", (8, 1))
    yield _spec("codes 0 then 15", "NibbleOrder ShortBlock", TABLE[[0, 15]], [1])
    yield _spec("codes 1 then 2", "NibbleOrder ShortBlock", TABLE[[1, 2]], [1])


def _misaligned() -> Iterator[Spec]:
    flags = "MisalignedRows FlattenRowMajor"
    for shape, blocksize in [
        ((4, 96), 64),
        ((3, 80), 32),
        ((5, 16), 64),
        ((3, 48), 32),
        ((3, 24), 32),
    ]:
        comment = f"rows of {shape[1]} in blocks of {blocksize}"
        yield _random(comment, flags, shape, blocksize)
    yield _random("rows of 96 to bfloat16", flags, (3, 96), 64, "bfloat16")
    yield _random("rows of 96 to float16", flags, (2, 96), 64, "float16")
    yield _random("rows of 192 in blocks of 128", flags, (2, 192), 128, "float16")


def _ends() -> Iterator[Spec]:
    yield _random("80 values: blocks of 64 and 16", "ShortBlock", (80,))
    yield _random("65 values", "ShortBlock OddLength", (65,))
    yield _random("5 values", "ShortBlock OddLength", (5,))
    yield _random("one value", "SingleElement OddLength", (1,))
    yield _random("one value, two axes", "SingleElement OddLength", (1, 1))
    yield _random("seven rows of one value", "FlattenRowMajor OddLength", (7, 1))
    codes = _codes("spare", 5)
    for spare in (0, 15):
        packed = np.append(codes, np.uint8(spare))
        comment = f"5 values, the spare code is {spare}"
        flags = "PadNibbleIgnored OddLength"
        yield _spec(comment, flags, packed, [0.7], shape=(5,))
    empty = _spec("no values", "Empty", codes[:0], [], shape=(0,))
    refuses = Alternative("refuses-empty", None)
    yield replace(empty, result="acceptable", alternatives=(refuses,))


def _dtypes(codebook: Array) -> Iterator[Spec]:
    for dtype in HALF:
        yield _random(f"two blocks to {dtype}", "RoundOnce", (2, 64), dtype=dtype)
        yield _random(f"odd length to {dtype}", "OddLength", (37,), dtype=dtype)
        yield _spec(f"all codes to {dtype}", "Table", TABLE, [1], dtype=dtype)
        yield _rounded_to_ties(codebook, dtype)
    for top in (65504, 65519, 65520, 1e6):
        comment = f"float16, absmax {top:g}"
        yield _spec(comment, "Overflow", COMMON, [top], dtype="float16")
    yield _spec("float16, absmax 1e-6", "Underflow", COMMON, [1e-6], dtype="float16")
    yield _spec(
        "float16, absmax 2**-25", "Underflow", COMMON, [2**-25], dtype="float16"
    )
    yield _spec(
        "bfloat16, absmax 1e-39", "Underflow", COMMON, [1e-39], dtype="bfloat16"
    )


def _scales() -> Iterator[Spec]:
    largest, smallest = np.finfo(F32).max, 2.0**-149
    yield _spec("the largest float32 as absmax", "Basic", COMMON, [largest])
    yield _spec("absmax 1e-39", "Underflow", COMMON, [1e-39])
    yield _spec("absmax 1e-44", "Underflow", COMMON, [1e-44])
    yield _spec("the smallest float32 as absmax", "Underflow", COMMON, [smallest])
    yield _spec("absmax 0", "ZeroScale", COMMON, [0])
    yield _random("a zero scale between others", "ZeroScale", (12,), 4, zero=1)


def _block_sizes() -> Iterator[Spec]:
    yield _random("blocks of 32", "BlockBoundary", (96,), 32)
    yield _random("blocks of 4", "BlockBoundary", (10,), 4)
    yield _random("blocks of 1", "BlockBoundary", (6,), 1)
    yield _random("one block of 1024", "LargeBlock", (1024,), 1024, "bfloat16")
    flags = "LargeBlock ShortBlock"
    yield _random("260 values in a block of 4096", flags, (260,), 4096, "bfloat16")


def _invalid() -> Iterator[Spec]:
    codes = _codes("invalid", 128)
    yield _refuse("two blocks, one scale", "ShapeMismatch", codes, [1], 64)
    yield _refuse("one block, no scale", "ShapeMismatch", codes[:64], [], 64)
    spec = _refuse("one byte short", "ShapeMismatch", codes[:64], [1], 64)
    packed = spec.inputs["packed"][:-1]
    yield replace(spec, inputs={**spec.inputs, "packed": packed})
    for blocksize in (0, -64):
        comment = f"a block size of {blocksize}"
        yield _refuse(comment, "InvalidBlocksize", codes[:64], [1], blocksize)


def _too_many() -> Iterator[Spec]:
    codes = _codes("too many", 64)
    yield _refuse("one block, two scales", "ShapeMismatch", codes, [1, 2], 64)
    spec = _refuse("one byte too many", "ShapeMismatch", codes, [1], 64)
    packed = np.append(spec.inputs["packed"], np.uint8(0x77))
    yield replace(spec, inputs={**spec.inputs, "packed": packed})


def _random(
    comment: str,
    flags: str,
    shape: tuple[int, ...],
    blocksize: int = 64,
    dtype: str = "float32",
    zero: int | None = None,
) -> Spec:
    size = prod(shape)
    absmax = np.abs(gaussian(comment, (-(-size // blocksize),))) + F32(0.1)
    if zero is not None:
        absmax[zero] = 0
    return _spec(comment, flags, _codes(comment, size), absmax, blocksize, shape, dtype)


def _rounded_to_ties(codebook: Array, dtype: str) -> Spec:
    """Every float32 product is half way between two outputs: even, odd, both signs."""
    bits = {"float16": 10, "bfloat16": 7}[dtype]
    ties = [F32(1 + (2 * k + 1) * 2.0 ** (-bits - 1)) for k in range(6)]
    inexact = np.frexp(codebook)[0] % 0.5 != 0  # neither zero nor a power of two
    codes = TABLE[inexact][: len(ties)]
    scales = [
        search.rounded_to_tie(np.abs(codebook[code]), tie)
        for code, tie in zip(codes, ties, strict=True)
    ]
    comment = f"products half way between two values of {dtype}"
    return _spec(comment, "RoundToEven RoundOnce", codes, scales, 1, dtype=dtype)


def _latitude(operation: str, spec: Spec) -> Spec:
    """Allow the other sign of a zero."""
    if spec.result != "valid":
        return spec
    ours = reference(operation, spec.inputs, spec.parameters)["W"]
    codes = blockwise.unpack(spec.inputs["packed"], 4, ours.size).reshape(ours.shape)
    ways = []
    if "ZeroScale" in spec.flags:
        unsigned = {"W": np.where(ours == 0, np.abs(ours), ours)}
        ways.append(Alternative("unsigned-zero", unsigned))
    if operation == "fp4_dequantize" and (codes == 8).any():
        signed = {"W": np.where(codes == 8, -ours, ours)}
        ways.append(Alternative("fp4-signed-zero", signed))
        spec = replace(spec, flags=(*spec.flags, "FP4TwoZeros"))
    if not ways:
        return spec
    return replace(spec, result="acceptable", alternatives=tuple(ways))


def _refuse(
    comment: str, flags: str, codes: Array, absmax: Sequence[Any], blocksize: int
) -> Spec:
    return replace(_spec(comment, flags, codes, absmax, blocksize), result="invalid")


def _codes(seed: str, size: int) -> Array:
    words = np.abs(gaussian(f"codes of {seed}", (size,), std=1000)).astype(np.int64)
    return COMMON[words % 15]
