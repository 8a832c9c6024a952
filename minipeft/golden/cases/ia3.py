"""Cases of ia3_forward, ia3_backward and ia3_merge."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.cases import File, Spec, any_zero, gaussian, integers
from minipeft.golden.tensors import Array
from minipeft.golden.vectors import Note

SIZES = (6, 5)  # in_features, out_features

NOTES = {
    "Keys": Note(
        "BASIC",
        "Keys and values: l scales the output, one number for each row of W.",
        "Columns are scaled instead; on a square weight without any error.",
        ("https://arxiv.org/abs/2205.05638",),
    ),
    "FeedForward": Note(
        "BASIC",
        "Feed-forward: l scales the input, one number for each column of W.",
        "Rows are scaled instead; on a square weight without any error.",
        ("https://arxiv.org/abs/2205.05638",),
    ),
    "SquareTrap": Note(
        "CONVENTION",
        "W is square: l fits either side.",
        "The wrong side is scaled without a word.",
        (),
    ),
    "Bias": Note(
        "CONVENTION",
        "l scales the bias of keys and values, and not that of feed-forward.",
        "The bias escapes the scaling, or meets one that is not its own.",
        (),
    ),
    "Start": Note(
        "EDGE_CASE",
        "l is 1, as at the start of training: the output is that of the base.",
        "l starts at 0, or is added to 1.",
        (),
    ),
    "Zero": Note(
        "HISTORIC_BUG",
        "Some l are 0 and some 1e-8: the product and nothing else.",
        "A small number added to l, to make division safe later, changes the merge.",
        ("https://github.com/huggingface/peft",),
    ),
    "LeadingAxes": Note(
        "EDGE_CASE",
        "x has no, one or more axes before in_features; gradients sum over them all.",
        "Only the first axis is summed, or a vector is taken for a matrix.",
        (),
    ),
    "Normal": Note(
        "NUMERICS",
        "Normal values: any order of summation stays within the bound.",
        "TF32 or half precision inside, though the tensors are float32.",
        (),
    ),
    "ShapeMismatch": Note(
        "EDGE_CASE",
        "l fits the other side of W, or neither.",
        "Broadcasting turns the mistake into numbers.",
        (),
    ),
}


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
            notes=NOTES,
            specs=[*_cases(f"ia3_{verb}")],
        )


def _cases(operation: str) -> Iterator[Spec]:
    for side, feedforward in (("Keys", False), ("FeedForward", True)):
        yield _spec(operation, "6 in, 5 out", side, feedforward)
        yield _spec(operation, "3 in, 7 out", side, feedforward, (3, 7))
        square = f"{side} SquareTrap"
        yield _spec(operation, "square", square, feedforward, (4, 4))
        spec = _spec(operation, "l is 1", f"{side} Start", feedforward)
        ones = np.ones_like(spec.inputs["l"])
        yield replace(spec, inputs={**spec.inputs, "l": ones})
        spec = _spec(operation, "l is 0, or nearly", f"{side} Zero", feedforward)
        small = spec.inputs["l"].copy()
        small[0], small[1], small[2] = 0, 2.0**-27, -(2.0**-27)
        sparse = {**spec.inputs, "l": small, "W": np.sign(spec.inputs["W"])}
        if operation == "ia3_merge":
            yield any_zero(operation, replace(spec, inputs=sparse))
        if operation != "ia3_merge":
            for comment, rows in [("x is a vector", ()), ("two leading axes", (2, 2))]:
                flags = f"{side} LeadingAxes"
                yield _spec(operation, comment, flags, feedforward, rows=rows)
            spec = _spec(operation, "with bias", f"{side} Bias", feedforward)
            bias = integers("ia3 bias", (SIZES[1],))
            yield replace(spec, inputs={**spec.inputs, "bias": bias})
        yield _normal(operation, side, feedforward)
        for n in (SIZES[not feedforward] + (1 if feedforward else -1), 1):
            spec = _spec(operation, f"l has {n} numbers", "ShapeMismatch", feedforward)
            inputs = {**spec.inputs, "l": integers("l", (n,))}
            yield replace(spec, inputs=inputs, result="invalid")


def _shapes(
    operation: str, sizes: tuple[int, int], rows: tuple[int, ...], feedforward: bool
) -> dict[str, tuple[int, ...]]:
    in_features, out_features = sizes
    weights: dict[str, tuple[int, ...]] = {
        "W": (out_features, in_features),
        "l": (in_features if feedforward else out_features,),
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
    feedforward: bool,
    sizes: tuple[int, int] = SIZES,
    rows: tuple[int, ...] = (2,),
) -> Spec:
    comment += ", input scaled" if feedforward else ", output scaled"
    seed, inputs = f"{operation} {comment}", dict[str, Array]()
    for name, shape in _shapes(operation, sizes, rows, feedforward).items():
        inputs[name] = integers(f"{seed} {name}", shape)
    parameters = {"feedforward": feedforward}
    spec = Spec(comment, tuple(flags.split()), inputs, parameters)
    return spec if rows else any_zero(operation, spec)  # a product is the whole sum


def _normal(operation: str, side: str, feedforward: bool) -> Spec:
    """Compared with a bound: a sum, the positions, and 4 roundings more."""
    sizes, rows = (15, 8), 4
    shapes = _shapes(operation, sizes, (rows,), feedforward)
    outputs = {
        "ia3_forward": ("y",),
        "ia3_backward": ("grad_x", "grad_l"),
        "ia3_merge": ("merged",),
    }[operation]
    seed = f"{operation} {side}"
    return Spec(
        comment=f"normal values, {side}",
        flags=(side, "Normal"),
        inputs={name: gaussian(f"{seed} {name}", s) for name, s in shapes.items()},
        parameters={"feedforward": feedforward},
        roundings=dict.fromkeys(outputs, sum(sizes) + rows + 4),
    )
