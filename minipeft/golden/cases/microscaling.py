"""Cases of mxfp4 and nvfp4: quantize and dequantize; bytes, always."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minipeft.golden.cases import Alternative, File, Spec, gaussian
from minipeft.golden.cases.build import either, refused
from minipeft.golden.tensors import Array
from minipeft.reference import microscaling as reference
from minipeft.reference.microscaling import E2M1, E4M3

MX = (
    "https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
)
NV = (
    "https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference/",
)

F32 = np.float32
CODES = np.concatenate([E2M1, -E2M1])
TIES = (E2M1[:-1] + E2M1[1:]) / 2
SMALLEST_NORMAL = E4M3[8]


def files() -> Iterator[File]:
    """Yield the four files of the row."""
    source = "minipeft.reference.microscaling"
    headers = {
        "mxfp4_quantize": (
            "X = 2^(floor(log2 max |W|) - 2) for each 32 values of a row; W / X to the",
            "nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the",
            "even code, above 6 to 6; two codes in a byte, the first one low.",
        ),
        "mxfp4_dequantize": ("W = value of the code * 2^(scale - 127).",),
        "nvfp4_quantize": (
            "s = max |W| / 2688; e = E4M3(max |W| of 16 values / (6 s)); W / (e s) to",
            "the values of MXFP4. Every operation is rounded to float32.",
        ),
        "nvfp4_dequantize": ("W = value of the code * (E4M3 scale * tensor_scale).",),
    }
    specs = {
        "mxfp4_quantize": _quantize_mx,
        "mxfp4_dequantize": _dequantize_mx,
        "nvfp4_quantize": _quantize_nv,
        "nvfp4_dequantize": _dequantize_nv,
    }
    for operation, header in headers.items():
        module, _, verb = operation.partition("_")
        yield File(
            operation=operation,
            header=header,
            source=f"{source}.{verb}_{module}",
            papers=MX if module == "mxfp4" else NV,
            specs=[*specs[operation]()],
        )


def _quantize_mx() -> Iterator[Spec]:
    yield from _weights("mx", 32)
    yield _spec("6 and -6, then zeros", "NibbleOrder", _row(32, [6, -6]))
    yield _spec("every code twice", "EveryCode", np.tile(CODES, 2)[None])
    yield _spec("every code at 2^-40", "EveryCode", np.tile(CODES, 2)[None] / 2**40)
    yield _spec("every midpoint", "Tie", _row(32, [6, *TIES, *-TIES]))
    for end, where in ((F32(9), "above"), (F32(0), "below")):
        values = np.nextafter(TIES, end)
        W = _row(32, [6, *values, *-values])
        yield _spec(f"one step {where} every midpoint", "NextToTie", W)
    yield _spec("the largest lies above 6 X", "Saturation", _row(32, [7.75, -7, 6.5]))
    W = _row(32, np.nextafter(F32(8), [F32(0), F32(9)]))
    yield _spec("one step below 8, and above", "Saturation", W)
    yield from _zeros(32)
    yield _spec("the smallest float32", "Subnormal", _row(32, [2**-149, -(2**-149)]))
    W = np.ldexp(np.linspace(-1, 1, 32, dtype=F32)[None], -127)
    yield _spec("2^-127 and below", "Subnormal", W)
    W = _row(32, [np.finfo(F32).max, 1e38])
    yield _spec("the largest float32", "LargeAbsmax", W)
    yield from _refused(32)


def _quantize_nv() -> Iterator[Spec]:
    yield from _weights("nv", 16)
    yield _spec("6 and -6, then zeros", "NibbleOrder", _row(16, [6, -6]))
    whole = np.concatenate([448 * CODES, CODES / 512])
    yield _small("every code, scales 448 and 1/512", "EveryCode EveryE4M3", whole[None])
    every = np.stack([np.full(16, 6 * s, F32) for s in E4M3[8:]])
    yield _spec("every normal scale", "EveryE4M3", every)
    ties = 448 * _row(16, [6, *TIES])
    yield _spec("every midpoint", "Tie", np.concatenate([ties, -ties]))
    middle = (E4M3[8:-1] + E4M3[9:]) / 2
    rows = np.stack([np.full(16, 6 * s, F32) for s in (*middle[::9], 448)])
    yield _spec("midpoints of scales", "Tie EveryE4M3", rows)
    small = np.concatenate([_row(16, [2688, 1]), _row(16, [6 / 256, -3 / 256])])
    yield _small("a scale below 2^-6", "Underflow", small)
    small = np.concatenate([_row(16, [2688, 1]), _row(16, [6 / 4096, -1 / 4096])])
    yield _small("a scale that rounds to zero", "Underflow ZeroBlock", small)
    for spec in _zeros(16):
        yield _small(spec.comment, " ".join(spec.flags), spec.inputs["W"])
    yield from _refused(16)
    wide = np.concatenate([_row(16, [2688 * 1024]), _row(16, [6, -3])])
    yield _small("6 in a block whose scale rounds to zero", "Underflow ZeroBlock", wide)
    # 3763 / 2688 of the smallest float32 is rounded to 1 of it: no scale is enough.
    W = _row(16, np.ldexp(np.array([3763, -1000], F32), -149))
    yield _spec("a tensor_scale rounded down, so that 448 is too small", "Subnormal", W)


def _weights(seed: str, blocksize: int) -> Iterator[Spec]:
    for comment, shape, std in (
        ("normal values", (4, 64), 1.0),
        ("values of the size of a model's weights", (2, 96), 0.02),
        ("three axes", (2, 3, blocksize), 0.3),
        ("one row, one axis", (2 * blocksize,), 5.0),
    ):
        W = gaussian(f"{seed} {comment}", shape, std)
        yield _agreed(_spec(comment, "Basic", W))
    W = gaussian(f"{seed} outlier", (2, 2 * blocksize), 0.02)
    W[1, 3] = 50
    yield _agreed(_spec("one outlier", "Outlier", W))


def _zeros(blocksize: int) -> Iterator[Spec]:
    zero = np.zeros((1, blocksize), F32)
    two = np.concatenate([_row(blocksize, [1, -0.5]), zero], axis=1)
    yield _spec("zeros beside another block", "ZeroBlock", two)
    W = np.concatenate([_row(blocksize, [1, -0.0, -1e-3]), -zero], axis=1)
    yield _spec("-0.0, and what rounds to it", "NegativeZero ZeroBlock", W)


def _refused(blocksize: int) -> Iterator[Spec]:
    fine = _spec("", "", _row(blocksize, [1, 2]))
    for bad in (np.nan, np.inf, -np.inf):
        W = _row(blocksize, [1, bad])
        yield refused(fine, f"W holds {bad}", "NotFinite", W=W)
    for width in (blocksize // 2, blocksize + 1):
        W = _row(width, [1, 2])
        yield refused(fine, f"rows of {width} values", "WholeBlocks", W=W)
    W = np.ones((blocksize, 3), F32)
    yield refused(fine, "blocks down the columns", "WholeBlocks", W=W)
    none = np.zeros((0, blocksize + 1), F32)
    yield refused(fine, f"no rows, of {blocksize + 1} values", "WholeBlocks", W=none)


def _dequantize_mx() -> Iterator[Spec]:
    table = _nibbles(np.tile(np.arange(16), 2)[None])
    for exponent in (127, 0, 1, 252):
        comment, scales = f"every code at 2^{exponent - 127}", _bytes([[exponent]])
        yield _decode(comment, "Table", {"packed": table, "scales": scales})
    codes = np.arange(96).reshape(3, 32) * 7 % 16
    parts = {"packed": _nibbles(codes), "scales": _bytes([[120], [127], [130]])}
    yield _decode("three rows, a scale for each", "Basic", parts)
    parts = {
        "packed": _nibbles(codes.reshape(1, 96)),
        "scales": _bytes([[1, 127, 131]]),
    }
    yield _decode("three blocks in a row", "Basic", parts)
    first = {"packed": _nibbles(_codes(32, [7, 15])), "scales": _bytes([[127]])}
    yield _decode("6 then -6", "NibbleOrder", first)
    for dtype in ("float16", "bfloat16"):
        yield _decode(f"to {dtype}", "RoundOnce", parts, dtype)
    fine = _decode("", "", first)
    scale = _bytes([[255]])
    yield refused(fine, "a scale of 255, which is NaN", "NotFinite", scales=scale)
    yield from _misfits(fine)
    scales = _bytes(np.arange(8).reshape(2, 2, 2) + 124)
    parts = {"packed": _three_axes(64), "scales": scales}
    yield _decode("three axes", "Basic", parts)


def _dequantize_nv() -> Iterator[Spec]:
    codes = np.arange(127 * 16).reshape(1, -1) * 5 % 16
    scales, one = _bytes(np.arange(127)[None]), np.asarray(F32(1))
    parts = {"packed": _nibbles(codes), "scales": scales, "tensor_scale": one}
    yield _decode("every scale", "EveryE4M3", parts)
    table = _nibbles(np.arange(16)[None])
    for scale, tensor_scale in ((56, 1), (56, 0.37), (126, 1e-3), (1, 3e-5)):
        parts = {"packed": table, "scales": _bytes([[scale]])}
        parts["tensor_scale"] = np.asarray(F32(tensor_scale))
        comment = f"every code, scale {scale}, tensor_scale {tensor_scale}"
        yield _decode(comment, "Table", parts)
    codes = np.arange(96).reshape(2, 48) * 7 % 16
    scales = _bytes([[56, 60, 70], [30, 126, 1]])
    parts = {"packed": _nibbles(codes), "scales": scales}
    parts["tensor_scale"] = np.asarray(F32(0.0123))
    yield _decode("two rows of three blocks", "Basic", parts)
    for dtype in ("float16", "bfloat16"):
        yield _decode(f"to {dtype}", "RoundOnce", parts, dtype)
    first = {"packed": _nibbles(_codes(16, [7, 15])), "scales": _bytes([[56]])}
    fine = _decode("6 then -6", "NibbleOrder", {**first, "tensor_scale": one})
    yield fine
    for scale, what in ((127, "NaN"), (255, "NaN with a sign")):
        comment = f"a scale of {scale}, which is {what}"
        yield refused(fine, comment, "NotFinite", scales=_bytes([[scale]]))
    yield from _misfits(fine)
    scales = _bytes(np.arange(8).reshape(2, 2, 2) * 15 + 1)
    parts = {"packed": _three_axes(32), "scales": scales}
    yield _decode("three axes", "Basic", {**parts, "tensor_scale": np.asarray(F32(3))})
    yield _zero_scale(table)
    yield from _bad_tensor_scales(fine)


def _bad_tensor_scales(fine: Spec) -> Iterator[Spec]:
    for value, flag in (
        (np.inf, "NotFinite"),
        (np.nan, "NotFinite"),
        (-1, "OutOfRange"),
    ):
        changed = np.asarray(F32(value))
        yield refused(fine, f"tensor_scale is {value}", flag, tensor_scale=changed)
    two = np.ones(2, F32)
    yield refused(fine, "two for tensor_scale", "ShapeMismatch", tensor_scale=two)


def _three_axes(width: int) -> Array:
    return _nibbles(np.arange(4 * width).reshape(2, 2, width) * 7 % 16)


def _zero_scale(table: Array) -> Spec:
    """All values are zero; accept those without a sign."""
    parts = {"packed": table, "scales": _bytes([[56]])}
    parts["tensor_scale"] = np.asarray(F32(0))
    spec = _decode("every code, tensor_scale 0", "ZeroScale", parts)
    return either(spec, Alternative("unsigned-zero", {"W": np.zeros((1, 16), F32)}))


def _misfits(fine: Spec) -> Iterator[Spec]:
    packed, scales = fine.inputs["packed"], fine.inputs["scales"]
    changes: dict[str, dict[str, Array]] = {
        "a scale too many": {"scales": np.repeat(scales, 2, axis=1)},
        "a row of scales too many": {"scales": np.repeat(scales, 2, axis=0)},
        "half a block of codes": {"packed": packed[:, : packed.shape[1] // 2]},
        "a byte too many": {"packed": np.append(packed, packed[:, :1], axis=1)},
    }
    for comment, change in changes.items():
        yield refused(fine, comment, "ShapeMismatch", **change)


def _small(comment: str, flags: str, W: Array) -> Spec:
    """Accept a scale of 2^-6 where ours is smaller: torchao stores no other."""
    spec = _spec(comment, flags, W)
    q = reference.quantize_nvfp4(W)
    scales = np.maximum(q.scales, np.uint8(8))
    if not q.tensor_scale or (scales == q.scales).all():
        return spec
    factor = F32(1) / q.tensor_scale / E4M3[scales]
    blocks = W.reshape(*scales.shape, 16) * factor[..., None]
    packed = reference._pack(reference._e2m1(blocks))
    outputs = {"packed": packed, "scales": scales, "tensor_scale": q.tensor_scale}
    return either(spec, Alternative("scale-at-least-normal", outputs))


def _agreed(spec: Spec) -> Spec:
    """Return the case; the order of scaling must not decide about any code."""
    W, q = spec.inputs["W"], reference.quantize_nvfp4(spec.inputs["W"])
    blocks = W.reshape(*q.scales.shape, 16)
    reciprocal = F32(1) / q.tensor_scale / E4M3[q.scales]
    twice = blocks / q.tensor_scale / E4M3[q.scales][..., None]
    for scaled in (blocks * reciprocal[..., None], twice):
        if (reference._pack(reference._e2m1(scaled)) != q.packed).any():
            raise AssertionError(f"{spec.comment}: the order decides; draw another")
    return spec


def _spec(comment: str, flags: str, W: Array) -> Spec:
    return Spec(comment, tuple(flags.split()), {"W": W.astype(F32)}, {})


def _decode(
    comment: str, flags: str, parts: dict[str, Array], dtype: str = "float32"
) -> Spec:
    return Spec(comment, tuple(flags.split()), parts, {"dtype": dtype})


def _row(width: int, values: Sequence[Any] | Array) -> Array:
    row = np.zeros((1, width), F32)
    row[0, : len(values)] = values
    return row


def _codes(width: int, first: Sequence[int]) -> Array:
    codes = np.zeros((1, width), np.uint8)
    codes[0, : len(first)] = first
    return codes


def _nibbles(codes: Array) -> Array:
    codes = codes.astype(np.uint8)
    packed: Array = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
    return packed


def _bytes(values: Any) -> Array:
    return np.asarray(values, np.uint8)
