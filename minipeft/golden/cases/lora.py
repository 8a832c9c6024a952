"""Cases of lora_forward, lora_backward and lora_merge.

Whole numbers and scalings that are powers of two make every partial sum exact, in any
order, so that those outputs are compared as bytes. Normal values come with a bound.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from minipeft.golden.cases import (
    Alternative,
    File,
    Spec,
    any_zero,
    gaussian,
    integers,
    several,
)
from minipeft.golden.cases.build import (
    Shapes,
    bounded,
    given,
    layer,
    misfits,
    normal,
    refused,
    whole,
)
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import Array
from minipeft.reference import lora
from minipeft.reference.lora import LoRA

PAPERS = ("https://arxiv.org/abs/2106.09685",)

F32 = np.float32

Sizes = tuple[int, int, int]  # in_features, out_features, r
SMALL: Sizes = (6, 5, 2)


def files() -> Iterator[File]:
    """Yield the five files of the row."""
    yield File(
        operation="lora_forward",
        header=(
            "y = x W^T + bias + s (x A^T) B^T, with s = alpha/r, or alpha/sqrt(r)",
            "where rank_stabilized is true.",
        ),
        source="minipeft.reference.lora.forward",
        papers=PAPERS,
        specs=_grown("lora_forward", _forward()),
    )
    yield File(
        operation="lora_backward",
        header=(
            "With G the gradient of y: grad_x = G W + s (G B) A, grad_A = s (G B)^T x,",
            "grad_B = s G^T (x A^T). W and bias are frozen.",
        ),
        source="minipeft.reference.lora.backward",
        papers=PAPERS,
        specs=_grown("lora_backward", _backward()),
    )
    yield File(
        operation="lora_merge",
        header=("merged = W + s B A, in the dtype of W, rounded once.",),
        source="minipeft.reference.lora.merge",
        papers=PAPERS,
        specs=[*_grown("lora_merge", _merge()), *_merge_steps()],
    )
    yield from several.files()


def _grown(operation: str, old: Iterator[Spec]) -> list[Spec]:
    first = list(old)
    return [*first, *_misfits(operation, first)]


def _forward() -> Iterator[Spec]:
    yield from _exact("lora_forward", (3,))
    yield from _leading_axes("lora_forward")
    yield _nine("lora_forward")
    spec = _spec("lora_forward", "with bias", "Bias Scaling", SMALL, 8, (3,))
    bias = integers("bias", (SMALL[1],), 16)
    yield given(spec, bias=bias)
    square = _spec("lora_forward", "square, with bias", "Bias SquareTrap", (4, 4, 4), 8)
    yield given(square, bias=bias[:4])
    for sizes, alpha, stable in _NORMAL:
        yield _normal("lora_forward", sizes, alpha, stable)
    spec = _normal("lora_forward", (15, 8, 3), 5, False)
    spec = replace(spec, comment=f"{spec.comment}, with bias")
    yield given(spec, bias=gaussian("normal bias", (8,)))
    yield from _invalid("lora_forward")
    yield _broken("lora_forward", "x is one column short", "x", (3, SMALL[0] - 1))
    spec = _broken("lora_forward", "bias is one short", "bias", (SMALL[1] - 1,))
    yield replace(spec, flags=("Bias", "ShapeMismatch"))


def _backward() -> Iterator[Spec]:
    yield from _exact("lora_backward", (2,))
    yield from _leading_axes("lora_backward")
    for sizes, alpha, stable in _NORMAL[::2]:
        yield _normal("lora_backward", sizes, alpha, stable)
    yield from _invalid("lora_backward")
    yield _broken("lora_backward", "grad_y is one short", "grad_y", (3, SMALL[1] - 1))


def _merge() -> Iterator[Spec]:
    yield from _exact("lora_merge", ())
    yield _nine("lora_merge")
    for sizes, alpha, stable in _NORMAL:
        yield _normal("lora_merge", sizes, alpha, stable)
    for dtype in (bfloat16, np.float16):
        yield _half_exact(np.dtype(dtype))
        yield _half_rounding(np.dtype(dtype))
    yield from _invalid("lora_merge")


_NORMAL: list[tuple[Sizes, float, bool]] = [
    ((15, 8, 3), 5, False),
    ((7, 18, 5), 0.3, False),
    ((10, 9, 6), 4, True),
]


def _exact(operation: str, rows: tuple[int, ...]) -> Iterator[Spec]:
    """Compared as bytes: whole numbers, scalings that are powers of two."""
    for comment, flags, sizes, alpha, stable in [
        ("alpha 4, r 2: scaling 2", "Basic Scaling", SMALL, 4, False),
        ("alpha 8, r 4: scaling 2", "Scaling", (7, 6, 4), 8, False),
        ("alpha 2, r 4: scaling 1/2", "Scaling", (6, 5, 4), 2, False),
        ("alpha -8, r 2: scaling -4", "Scaling", SMALL, -8, False),
        ("alpha 0.5, r 2: scaling 1/4", "Scaling", SMALL, 0.5, False),
        ("alpha 8, r 4: scaling 4", "RankStabilized", (6, 5, 4), 8, True),
        ("wide: 9 in, 3 out, r 2", "Orientation", (9, 3, 2), 8, False),
        ("tall: 3 in, 9 out, r 2", "Orientation", (3, 9, 2), 8, False),
        ("r equals out_features", "Orientation FullRank", (5, 3, 3), 6, False),
        ("r equals in_features", "Orientation FullRank", (3, 5, 3), 6, False),
        ("4 in, 4 out, r 4", "SquareTrap FullRank", (4, 4, 4), 8, False),
        ("4 in, 4 out, r 2", "SquareTrap", (4, 4, 2), 4, False),
        ("r 1: scaling 2", "RankOne", (6, 5, 1), 2, False),
        ("one input, one output", "RankOne SquareTrap", (1, 1, 1), 2, False),
    ]:
        yield _spec(operation, comment, flags, sizes, alpha, rows, stable)
    spec = _spec(operation, "B is zero", "Start", SMALL, 8, rows)
    spec = given(spec, B=np.zeros_like(spec.inputs["B"]))
    # Every term of A's gradient is 0 or -0.
    yield any_zero(operation, spec) if operation == "lora_backward" else spec


def _spec(
    operation: str,
    comment: str,
    flags: str,
    sizes: Sizes,
    alpha: float,
    rows: tuple[int, ...] = (2,),
    stable: bool = False,
) -> Spec:
    shapes, parameters = _shapes(operation, sizes, rows), _parameters(alpha, stable)
    return whole(operation, comment, flags, shapes, parameters)


def _nine(operation: str) -> Spec:
    comment = "alpha 6, r 9: scaling 2"  # sqrt(9) is exact, and no power of two
    return _spec(operation, comment, "RankStabilized", (10, 11, 9), 6, stable=True)


def _leading_axes(operation: str) -> Iterator[Spec]:
    for comment, rows in [
        ("x is a vector", ()),
        ("x has one row", (1,)),
        ("x has two leading axes", (2, 2)),
        ("x has three leading axes", (2, 1, 2)),
    ]:
        yield _spec(operation, comment, "LeadingAxes", SMALL, 8, rows)


def _normal(operation: str, sizes: Sizes, alpha: float, stable: bool) -> Spec:
    """Compared with a bound that counts the roundings from any input to the output."""
    in_features, out_features, r = sizes
    rows = 4
    shapes, parameters = _shapes(operation, sizes, (rows,)), _parameters(alpha, stable)
    # Sums of those lengths; 2 roundings in the scaling, 1 when it multiplies, 2 when
    # base and bias are added, 1 in the output that the vector holds.
    others = 6
    lengths = {
        "y": in_features + r,
        "grad_x": out_features + r,
        "grad_A": out_features + rows,
        "grad_B": in_features + rows,
        "merged": r,
    }
    roundings = {o: lengths[o] + others for o in OPERATIONS[operation].outputs}
    comment = f"normal values, {in_features} in, {out_features} out, r {r}"
    flags = "Normal RankStabilized" if stable else "Normal Scaling"
    seed = f"{operation} {sizes} {alpha}"
    return bounded(
        operation, normal(seed, comment, flags, shapes, parameters), roundings
    )


def _half_exact(dtype: np.dtype[Any]) -> Spec:
    spec = _spec("lora_merge", f"W is {dtype}, the sum exact", "Scaling", SMALL, 8, ())
    return given(spec, W=spec.inputs["W"].astype(dtype))


def _half_rounding(dtype: np.dtype[Any]) -> Spec:
    """One rounding or two: the update is not a number of the weight's dtype."""
    in_features, out_features, r = SMALL
    W = gaussian(f"merge W {dtype}", (out_features, in_features), 0.5).astype(dtype)
    # Few bits in each factor: the update is exact in float32, however it is summed.
    A = np.round(gaussian("merge A", (r, in_features)) * 64) / F32(512)
    B = np.round(gaussian("merge B", (out_features, r)) * 64) / F32(512)
    update = F32(4) * (B @ A)
    once = (W.astype(F32) + update).astype(dtype)
    twice = (W.astype(F32) + update.astype(dtype).astype(F32)).astype(dtype)
    assert once.tobytes() != twice.tobytes(), "the case shows nothing"
    return Spec(
        comment=f"W is {dtype}, the sum is rounded",
        flags=("MergeRounding",),
        inputs={"W": W, "A": A, "B": B},
        parameters=_parameters(8, False),
        result="acceptable",
        outputs={"merged": once},
        alternatives=(Alternative("update-rounded-first", {"merged": twice}),),
    )


def _merge_steps() -> Iterator[Spec]:
    """Sums beside the numbers of a dtype: from `top` on, it has the even ones alone."""
    for dtype, top in ((np.dtype(bfloat16), 256), (np.dtype(np.float16), 2048)):
        W = np.array([[1, 3], [-1, -3]], dtype)
        comment = f"W is {dtype}, sums half way between two numbers"
        yield _shifted(comment, W, F32(top))
        spec = _shifted(f"W is {dtype}, 1 + {top + 1}", W[:, :1], F32(top + 1))
        sizes = np.full((2, 1), top, F32)  # top + 1 becomes top, and so does the sum
        twice = np.copysign(sizes, W[:, :1].astype(F32)).astype(dtype)
        way = Alternative("update-rounded-first", {"merged": twice})
        yield replace(spec, result="acceptable", alternatives=(way,))


def _shifted(comment: str, W: Array, update: np.float32) -> Spec:
    """Move every weight away from zero."""
    A, B = np.ones((1, W.shape[1]), F32), np.array([[update], [-update]]) / F32(2)
    inputs = {"W": W, "A": A, "B": B}
    return Spec(comment, ("MergeRounding",), inputs, _parameters(2, False))


def _invalid(operation: str) -> Iterator[Spec]:
    in_features, out_features, r = SMALL
    yield _broken(operation, "A has r + 1 rows", "A", (r + 1, in_features))
    yield _broken(operation, "B has r + 1 columns", "B", (out_features, r + 1))
    yield _broken(operation, "A is transposed", "A", (in_features, r))
    yield _broken(operation, "B is transposed", "B", (r, out_features))
    yield _broken(operation, "A is one column short", "A", (r, in_features - 1))
    yield _broken(operation, "B is one row short", "B", (out_features - 1, r))
    yield _broken(operation, "B has one row", "B", (1, r))
    yield refused(_spec(operation, "r is 0", "", (6, 5, 0), 8), "r is 0", "ZeroRank")
    yield _too_large(operation)


def _too_large(operation: str) -> Spec:
    """Use a rank above that of the weight: computable, but useless."""
    comment = "r is larger than any rank of W"
    spec = _spec(operation, comment, "ExcessiveRank", (4, 3, 8), 16)
    W, adapter = spec.inputs["W"], LoRA(spec.inputs["A"], spec.inputs["B"], 2.0)
    if operation == "lora_merge":
        answer = {"merged": lora.merge(W, adapter)}
    elif operation == "lora_forward":
        answer = {"y": lora.forward(spec.inputs["x"], W, adapter)}
    else:
        grads = lora.backward(spec.inputs["grad_y"], spec.inputs["x"], W, adapter)
        answer = {"grad_x": grads.x, "grad_A": grads.A, "grad_B": grads.B}
    anyway = Alternative("computes-any-rank", answer)
    return replace(spec, result="acceptable", outputs={}, alternatives=(anyway,))


def _broken(operation: str, comment: str, name: str, shape: tuple[int, ...]) -> Spec:
    spec = _spec(operation, comment, "ShapeMismatch", SMALL, 8, (3,))
    change = {name: integers(comment, shape)}
    return refused(spec, comment, "ShapeMismatch", **change)


def _misfits(operation: str, old: list[Spec]) -> Iterator[Spec]:
    fine = _spec(operation, "fits", "ShapeMismatch", SMALL, 8, (3,))
    if operation == "lora_forward":
        fine = given(fine, bias=integers("lora fits", SMALL[1:2]))
    yield from misfits(operation, fine, old)


def _shapes(operation: str, sizes: Sizes, rows: tuple[int, ...]) -> Shapes:
    in_features, out_features, r = sizes
    weights = {
        "W": (out_features, in_features),
        "A": (r, in_features),
        "B": (out_features, r),
    }
    return layer(operation, rows, weights)


def _parameters(alpha: float, stable: bool) -> dict[str, Any]:
    return {"alpha": alpha, "rank_stabilized": stable}
