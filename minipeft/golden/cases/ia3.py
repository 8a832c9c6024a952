"""Cases of ia3_forward, ia3_backward and ia3_merge."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.cases import File, Spec, any_zero, gaussian, integers
from minipeft.golden.tensors import Array

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
    for flag, side in (("Keys", "output"), ("FeedForward", "input")):
        yield _spec(operation, "6 in, 5 out", flag, side)
        yield _spec(operation, "3 in, 7 out", flag, side, (3, 7))
        square = f"{flag} SquareTrap"
        yield _spec(operation, "square", square, side, (4, 4))
        spec = _spec(operation, "l is 1", f"{flag} Start", side)
        ones = np.ones_like(spec.inputs["l"])
        yield replace(spec, inputs={**spec.inputs, "l": ones})
        spec = _spec(operation, "l is 0, or nearly", f"{flag} ZeroFactor", side)
        small = spec.inputs["l"].copy()
        small[0], small[1], small[2] = 0, 2.0**-27, -(2.0**-27)
        sparse = {**spec.inputs, "l": small, "W": np.sign(spec.inputs["W"])}
        if operation == "ia3_merge":
            yield any_zero(operation, replace(spec, inputs=sparse))
        if operation != "ia3_merge":
            for comment, rows in [("x is a vector", ()), ("two leading axes", (2, 2))]:
                flags = f"{flag} LeadingAxes"
                yield _spec(operation, comment, flags, side, rows=rows)
            spec = _spec(operation, "with bias", f"{flag} Bias", side)
            bias = integers("ia3 bias", (SIZES[1],))
            yield replace(spec, inputs={**spec.inputs, "bias": bias})
        yield _normal(operation, flag, side)
        # One less than there are outputs, or one more than inputs; and a single one.
        for n in (SIZES[side == "output"] + (1 if side == "input" else -1), 1):
            spec = _spec(operation, f"l has {n} numbers", "ShapeMismatch", side)
            inputs = {**spec.inputs, "l": integers("l", (n,))}
            yield replace(spec, inputs=inputs, result="invalid")


def _shapes(
    operation: str, sizes: tuple[int, int], rows: tuple[int, ...], side: str
) -> dict[str, tuple[int, ...]]:
    in_features, out_features = sizes
    weights: dict[str, tuple[int, ...]] = {
        "W": (out_features, in_features),
        "l": (in_features if side == "input" else out_features,),
    }
    if operation == "ia3_merge":
        return weights
    x = {"x": (*rows, in_features)}
    grad_y = {"grad_y": (*rows, out_features)} if operation == "ia3_backward" else {}
    return grad_y | x | weights


def _spec(
    operation: str,
    comment: str,
    flags: str,
    side: str,
    sizes: tuple[int, int] = SIZES,
    rows: tuple[int, ...] = (2,),
) -> Spec:
    comment += f", {side} scaled"
    seed, inputs = f"{operation} {comment}", dict[str, Array]()
    for name, shape in _shapes(operation, sizes, rows, side).items():
        inputs[name] = integers(f"{seed} {name}", shape)
    parameters = {"side": side}
    spec = Spec(comment, tuple(flags.split()), inputs, parameters)
    return spec if rows else any_zero(operation, spec)  # a product is the whole sum


def _normal(operation: str, flag: str, side: str) -> Spec:
    """Compared with a bound: a sum, the positions, and 4 roundings more."""
    sizes, rows = (15, 8), 4
    shapes = _shapes(operation, sizes, (rows,), side)
    outputs = {
        "ia3_forward": ("y",),
        "ia3_backward": ("grad_x", "grad_l"),
        "ia3_merge": ("merged",),
    }[operation]
    seed = f"{operation} {flag}"
    return Spec(
        comment=f"normal values, {flag}",
        flags=(flag, "Normal"),
        inputs={name: gaussian(f"{seed} {name}", s) for name, s in shapes.items()},
        parameters={"side": side},
        roundings=dict.fromkeys(outputs, sum(sizes) + rows + 4),
    )
