"""Cases of double_quant_quantize and double_quant_dequantize: bytes, always."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from minipeft.golden.cases import Alternative, File, Spec, gaussian, reference
from minipeft.golden.cases.blockwise.peers import ways
from minipeft.golden.cases.blockwise.search import midpoints
from minipeft.golden.cases.build import either, given, refused
from minipeft.golden.tensors import Array, numpy_dtype
from minipeft.reference import double_quant
from minipeft.reference.blockwise import quantize
from minipeft.reference.codebook import NF4, dynamic_map

PAPERS = ("https://arxiv.org/abs/2305.14314",)
NESTED = dynamic_map()


def files() -> Iterator[File]:
    """Yield the two files of the row."""
    yield File(
        operation="double_quant_quantize",
        header=(
            "packed, absmax = NF4 of W in blocks; offset = mean(absmax);",
            "absmax - offset is quantized blockwise to the signed dynamic map.",
        ),
        source="minipeft.reference.double_quant.quantize",
        papers=PAPERS,
        specs=[*_quantize()],
    )
    yield File(
        operation="double_quant_dequantize",
        header=(
            "absmax = map[code] * nested_absmax + offset; W = NF4[code] * absmax.",
        ),
        source="minipeft.reference.double_quant.dequantize",
        papers=PAPERS,
        specs=[*_dequantize()],
    )


def _weights() -> Iterator[tuple[str, str, Array, tuple[int, int]]]:
    yield "4 blocks of 64", "Basic", gaussian("dq basic", (4, 64), 0.02), (64, 256)
    yield "blocks within rows", "Basic Mean", gaussian("dq", (9, 40), 0.1), (8, 16)
    # 256 scales whose distances from their mean are the values of the map itself.
    scales = 4 + dynamic_map()
    every = np.stack([scales, -scales / 2], axis=1).astype(np.float32)
    yield "256 scales, all distances", "EveryScaleCode", every, (2, 256)
    equal = gaussian("dq equal", (6, 8), 0.1).clip(-1, 1)
    equal[:, 5] = -1.5
    yield "six equal scales", "Equal", equal, (8, 4)
    zeros = gaussian("dq zeros", (5, 16))
    zeros[2] = 0
    yield "one block of zeros", "ZeroBlock Mean", zeros, (16, 256)
    yield "nothing but zeros", "ZeroBlock Equal", np.zeros((3, 8), np.float32), (8, 2)
    yield "35 weights", "ShortBlock Mean", gaussian("dq short", (5, 7)), (4, 4)
    yield "one weight", "ShortBlock", np.array([-0.3], np.float32), (64, 256)


def _quantize() -> Iterator[Spec]:
    for comment, flags, W, sizes in _weights():
        yield _either(_spec(comment, flags, {"W": W}, _sizes(*sizes)))
    bad = gaussian("dq bad", (2, 8))
    fine = _spec("", "", {"W": bad}, _sizes(4, 4))
    for comment, b, b2 in (("blocks of 12", 12, 4), ("nested in 3", 4, 3)):
        yield refused(fine, comment, "InvalidBlocksize", **_sizes(b, b2))
    bad = bad.copy()
    bad[1, 2] = np.nan
    yield refused(fine, "one NaN", "NotFinite", W=bad)
    for shape in ((0,), (0, 64)):
        empty = {"W": np.zeros(shape, np.float32)}
        spec = _spec(f"shape {list(shape)}", "Empty", empty, _sizes(64, 256))
        yield either(spec, Alternative("refuses-empty", None))
    for dtype in ("bfloat16", "float16"):
        W = gaussian(f"dq {dtype}", (4, 64), 0.02, numpy_dtype(dtype))
        spec = _spec(f"{dtype} weights", "HalfInput", {"W": W}, _sizes(64, 256))
        yield _either(spec)


def _either(spec: Spec) -> Spec:
    """Accept the codes that others give the weights, with the same scales."""
    parts = reference("double_quant_quantize", spec.inputs, spec.parameters)
    for name, (packed, _) in ways(spec.inputs["W"], NF4, spec.parameters["blocksize"]):
        if packed.tobytes() != parts["packed"].tobytes():
            spec = either(spec, Alternative(name, {**parts, "packed": packed}))
    return _either_mean(spec, dict(parts))


def _either_mean(spec: Spec, parts: dict[str, Array]) -> Spec:
    """Accept a mean that is summed in float32, in any order, where it decides no code.

    Its error is n roundings of the sum and the quotient; a nested scale is the largest
    distance from it, rounded once more.
    """
    absmax = quantize(spec.inputs["W"], NF4, spec.parameters["blocksize"]).absmax
    n = len(absmax)
    exact = not (absmax.astype(np.float64) * 8 % 1).any()  # and every partial sum
    if n == 1 or exact:
        return spec
    nested = spec.parameters["nested_blocksize"]
    scales = np.repeat(parts["nested_absmax"], nested)[:n].astype(np.float64)
    near = np.subtract.outer((absmax - parts["offset"]) / scales, midpoints(NESTED))
    error = 3 * (n + 1) * 2.0**-24 * (absmax.max() + parts["offset"]) / scales.min()
    if np.abs(near).min() < error:
        return spec
    sizes = {
        "nested_absmax": np.full(len(parts["nested_absmax"]), 2 * absmax.max()),
        "offset": np.asarray(parts["offset"]),
    }
    rules = {"nested_absmax": n + 1, "offset": n}
    return either(spec, Alternative("mean-in-float32", parts, rules, sizes))


def _dequantize() -> Iterator[Spec]:
    for comment, flags, W, sizes in _weights():
        kept = flags.replace(" Mean", "")  # no mean is taken here
        yield _decode(comment, f"{kept} TwoRoundings", W, sizes, "float32")
    for dtype in ("bfloat16", "float16"):
        W = gaussian("dq basic", (4, 64), 0.02)
        yield _decode(f"to {dtype}", "RoundOnce", W, (64, 256), dtype)
    W = gaussian("dq basic", (4, 64), 0.02)
    for name in ("packed", "absmax_codes", "nested_absmax"):
        for comment, change in ((f"{name} is one short", -1), (f"{name} is longer", 1)):
            spec = _decode(comment, "ShapeMismatch", W, (64, 256), "float32")
            part = np.resize(spec.inputs[name], len(spec.inputs[name]) + change)
            yield refused(spec, comment, "ShapeMismatch", **{name: part})
    yield _negative()


def _negative() -> Spec:
    """A scale far below the others can come back below zero."""
    W = np.ones((4, 4), np.float32)
    spec = _decode("scales below zero", "TwoRoundings", W, (4, 256), "float32")
    return given(
        spec,
        packed=np.arange(8, dtype=np.uint8) * np.uint8(31),
        absmax_codes=np.array([0, 60, 127, 255], np.uint8),
        nested_absmax=np.array([0.7], np.float32),
        offset=np.asarray(np.float32(0.3)),
    )


def _decode(
    comment: str, flags: str, W: Array, sizes: tuple[int, int], dtype: str
) -> Spec:
    q = double_quant.quantize(W, blocksize=sizes[0], nested_blocksize=sizes[1])
    inputs = {
        "packed": q.packed,
        "absmax_codes": q.absmax_codes,
        "nested_absmax": q.nested_absmax,
        "offset": np.asarray(q.offset),
    }
    parameters = _sizes(*sizes) | {"shape": list(W.shape), "dtype": dtype}
    return _spec(comment, flags, inputs, parameters)


def _sizes(blocksize: int, nested_blocksize: int) -> dict[str, Any]:
    return {"blocksize": blocksize, "nested_blocksize": nested_blocksize}


def _spec(
    comment: str, flags: str, inputs: dict[str, Array], parameters: dict[str, Any]
) -> Spec:
    return Spec(comment, tuple(flags.split()), inputs, parameters)
