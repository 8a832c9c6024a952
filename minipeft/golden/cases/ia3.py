"""Cases of ia3_forward, ia3_backward and ia3_merge."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.cases import (
    Alternative,
    File,
    Spec,
    any_zero,
    integers,
    reference,
)
from minipeft.golden.cases.build import (
    Shapes,
    absolute,
    bounded,
    doubled,
    either,
    given,
    layer,
    misfits,
    normal,
    refused,
    whole,
)

PAPERS = ("https://arxiv.org/abs/2205.05638",)

SIZES = (6, 5)  # in_features, out_features


def files() -> Iterator[File]:
    """Yield the three files of the row."""
    for verb, header in {
        "forward": ("y = l * (x W^T + bias), or (l * x) W^T + bias in feed-forward.",),
        "backward": ("grad_x = (l * grad_y) W and grad_l = sum of grad_y * (x W^T +",
                     "bias); or l * (grad_y W) and sum of x * (grad_y W)."),
        "merge": ("merged = diag(l) W, or W diag(l) in feed-forward.",),
    }.items():  # fmt: skip
        yield File(
            operation=f"ia3_{verb}",
            header=header,
            source=f"minipeft.reference.ia3.{verb}",
            papers=PAPERS,
            specs=[*_cases(f"ia3_{verb}")],
        )


def _cases(operation: str) -> Iterator[Spec]:
    old = list(_old(operation))
    yield from (_relative(operation, spec) for spec in old)
    for side in ("output", "input"):
        fine = _spec(operation, "fits", "ShapeMismatch", side)
        if operation != "ia3_merge":
            fine = given(fine, bias=integers("ia3 fits", SIZES[1:]))
        seen = (spec for spec in old if spec.parameters["side"] == side)
        for spec in misfits(operation, fine, seen):
            yield replace(spec, comment=f"{spec.comment}, {side} scaled")


def _relative(operation: str, spec: Spec) -> Spec:
    """Accept a factor of 1 + l, too: then training starts at l = 0."""
    if spec.result != "valid":
        return spec
    wide = given(spec, l=spec.inputs["l"].astype(np.float64) + 1)
    if spec.roundings:
        wide = replace(wide, inputs=doubled(wide.inputs))
        exact = reference(operation, wide.inputs, spec.parameters)
        sizes = absolute(wide.inputs) | {
            "l": 1 + np.abs(spec.inputs["l"].astype(float))
        }
        bounds = reference(operation, sizes, spec.parameters)
        n = {name: n + 1 for name, n in spec.roundings.items()}
    else:
        exact = reference(operation, wide.inputs, spec.parameters)
        zeros = any((array == 0).any() for array in exact.values())
        n = dict.fromkeys(exact, 1) if zeros else {}
        bounds = {k: np.abs(v) for k, v in exact.items()} if zeros else {}
    outputs = {name: array.astype(np.float32) for name, array in exact.items()}
    return either(spec, Alternative("relative-to-1", outputs, n, bounds))


def _old(operation: str) -> Iterator[Spec]:
    for flag, side in (("Keys", "output"), ("FeedForward", "input")):
        yield _spec(operation, "6 in, 5 out", flag, side)
        yield _spec(operation, "3 in, 7 out", flag, side, (3, 7))
        square = f"{flag} SquareTrap"
        yield _spec(operation, "square", square, side, (4, 4))
        spec = _spec(operation, "l is 1", f"{flag} Start", side)
        ones = given(spec, l=np.ones_like(spec.inputs["l"]))
        yield ones
        spec = _spec(operation, "l is 0, or nearly", f"{flag} ZeroFactor", side)
        small = spec.inputs["l"].copy()
        small[0], small[1], small[2] = 0, 2.0**-27, -(2.0**-27)
        if operation == "ia3_merge":
            sparse = given(spec, l=small, W=np.sign(spec.inputs["W"]))
            yield any_zero(operation, sparse)
        if operation != "ia3_merge":
            for comment, rows in [("x is a vector", ()), ("two leading axes", (2, 2))]:
                flags = f"{flag} LeadingAxes"
                yield _spec(operation, comment, flags, side, rows=rows)
            spec = _spec(operation, "with bias", f"{flag} Bias", side)
            biased = given(spec, bias=integers("ia3 bias", SIZES[1:]))
            # One sum is 0, and then scaled: 0 or -0.
            zero = operation == "ia3_forward" and side == "output"
            yield any_zero(operation, biased) if zero else biased
        yield _normal(operation, flag, side)
        yield from _invalid(operation, side)


def _invalid(operation: str, side: str) -> Iterator[Spec]:
    # One less than there are outputs, or one more than inputs; and a single one.
    for n in (SIZES[side == "output"] + (1 if side == "input" else -1), 1):
        comment = f"l has {n} numbers"
        spec = _spec(operation, comment, "ShapeMismatch", side)
        l = integers("l", (n,))  # noqa: E741
        yield refused(spec, spec.comment, "ShapeMismatch", l=l)


def _shapes(
    operation: str, sizes: tuple[int, ...], rows: tuple[int, ...], side: str
) -> Shapes:
    in_features, out_features = sizes
    weights: dict[str, tuple[int, ...]] = {
        "W": (out_features, in_features),
        "l": (in_features if side == "input" else out_features,),
    }
    return layer(operation, rows, weights)


def _spec(
    operation: str,
    comment: str,
    flags: str,
    side: str,
    sizes: tuple[int, ...] = SIZES,
    rows: tuple[int, ...] = (2,),
) -> Spec:
    comment, shapes = f"{comment}, {side} scaled", _shapes(operation, sizes, rows, side)
    spec = whole(operation, comment, flags, shapes, {"side": side})
    return spec if rows else any_zero(operation, spec)  # a product is the whole sum


def _normal(operation: str, flag: str, side: str) -> Spec:
    """Compared with a bound: a sum, the positions, and 4 roundings more."""
    sizes, rows = (15, 8), 4
    shapes = _shapes(operation, sizes, (rows,), side)
    comment = f"normal values, {flag}"
    parameters = {"side": side}
    spec = normal(f"{operation} {flag}", comment, f"{flag} Normal", shapes, parameters)
    return bounded(operation, spec, sum(sizes) + rows + 4)
