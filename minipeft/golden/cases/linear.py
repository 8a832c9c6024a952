"""Cases of linear_forward and linear_backward.

Whole numbers make every partial sum exact, in any order, so that those outputs are
compared as bytes. Normal values come with a bound.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.cases import File, Named, Spec, any_zero, integers
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
from minipeft.golden.tensors import Array

Sizes = tuple[int, int]  # in_features, out_features
SMALL: Sizes = (6, 5)


def files() -> Iterator[File]:
    """Yield the two files of the row."""
    headers = {
        "forward": ("y = x W^T + bias.",),
        "backward": (
            "With G the gradient of y: grad_x = G W, grad_W = G^T x, and grad_bias =",
            "sum of G; the last two sum over all leading axes.",
        ),
    }
    for verb, header in headers.items():
        operation = f"linear_{verb}"
        yield File(
            operation=operation,
            header=header,
            source=f"minipeft.reference.linear.{verb}",
            specs=[*_old(operation), *_misfits(operation)],
        )


def _old(operation: str) -> Iterator[Spec]:
    yield from _exact(operation)
    yield from _normal(operation)
    yield from _invalid(operation)


def _misfits(operation: str) -> Iterator[Spec]:
    fine = _spec(operation, "fits", "ShapeMismatch", SMALL, (3,))
    if operation == "linear_forward":
        fine = given(fine, bias=integers("linear fits", SMALL[1:]))
    yield from misfits(operation, fine, _invalid(operation))


def _exact(operation: str) -> Iterator[Spec]:
    for comment, flags, sizes, rows in [
        ("6 in, 5 out", "Basic Bias", SMALL, (3,)),
        ("wide: 9 in, 2 out", "Basic Bias", (9, 2), (3,)),
        ("tall: 2 in, 9 out", "Basic Bias", (2, 9), (3,)),
        ("square", "SquareTrap Bias", (4, 4), (3,)),
        ("x is square as well", "SquareTrap Bias", (4, 4), (4,)),
        ("x is a vector", "LeadingAxes", SMALL, ()),
        ("x has one row", "LeadingAxes", SMALL, (1,)),
        ("two leading axes", "LeadingAxes", SMALL, (2, 2)),
        ("three leading axes", "LeadingAxes", SMALL, (2, 1, 2)),
        ("one input", "OneByOne", (1, 5), (2,)),
        ("one output", "OneByOne", (6, 1), (2,)),
        ("one input, one output", "OneByOne", (1, 1), (2,)),
        ("no rows", "EmptyBatch", SMALL, (0,)),
        ("no rows, two leading axes", "EmptyBatch", SMALL, (2, 0)),
    ]:
        yield from _with_and_without_bias(
            operation, _spec(operation, comment, flags, sizes, rows)
        )
    spec = _spec(operation, "-0.0 in x and W", "NegativeZero", SMALL, (3,))
    inputs = {name: _signed_zeros(array) for name, array in spec.inputs.items()}
    yield any_zero(operation, replace(spec, inputs=inputs))
    spec = _spec(operation, "large terms cancel", "Cancellation", SMALL, (5,))
    yield replace(spec, inputs=_cancelling(spec.inputs))


def _with_and_without_bias(operation: str, spec: Spec) -> Iterator[Spec]:
    if operation == "linear_backward":
        yield spec
        return
    flags = tuple(flag for flag in spec.flags if flag != "Bias")
    yield replace(spec, flags=flags)
    bias = integers(f"{spec.comment} bias", (len(spec.inputs["W"]),), 16)
    comment, flags = f"{spec.comment}, with bias", (*flags, "Bias")
    yield replace(given(spec, bias=bias), comment=comment, flags=flags)


def _signed_zeros(array: Array) -> Array:
    """Put -0.0 where there was -1, and 0.0 where there was 1."""
    return np.where(np.abs(array) == 1, array * np.float32(0), array)


def _cancelling(inputs: Named) -> dict[str, Array]:
    """Let large terms first meet small ones: columns of x, or rows backward."""
    large = np.float32(2**10)
    changed = {name: array.copy() for name, array in inputs.items()}
    if "grad_y" in inputs:
        G, x = changed["grad_y"], changed["x"]
        G[:2] *= large
        G[3:], x[3:] = -G[:2], x[:2]
    else:
        x, W = changed["x"], changed["W"]
        x[:, :2] *= large
        x[:, 4:], W[:, 4:] = x[:, :2], -W[:, :2]
    return changed


def _normal(operation: str) -> Iterator[Spec]:
    """Yield cases whose bound counts a rounding a product, and one for the output.

    In forward the bias adds a rounding; the gradient of the bias has no products.
    """
    for sizes, rows in (((15, 8), 4), ((7, 18), 3)):
        shapes = dict(_shapes(operation, sizes, (rows,)))
        roundings = {"grad_x": sizes[1] + 1, "grad_W": rows + 1, "grad_bias": rows}
        if operation == "linear_forward":
            shapes["bias"] = (sizes[1],)
            roundings = {"y": sizes[0] + 2}
        comment = "normal values, {} in, {} out".format(*sizes)
        seed = f"{operation} normal {sizes}"
        spec = normal(seed, comment, "Normal", shapes, {})
        yield bounded(operation, spec, roundings)


def _invalid(operation: str) -> Iterator[Spec]:
    in_features, out_features = SMALL
    yield _broken(operation, "x is one column short", "x", (3, in_features - 1))
    yield _broken(operation, "x has one column", "x", (3, 1))
    yield _broken(operation, "W is transposed", "W", (in_features, out_features))
    if operation == "linear_forward":
        yield _broken(operation, "bias is one short", "bias", (out_features - 1,))
        return
    yield _broken(operation, "grad_y is one short", "grad_y", (3, out_features - 1))
    yield _broken(operation, "grad_y has other rows", "grad_y", (2, out_features))


def _broken(operation: str, comment: str, name: str, shape: tuple[int, ...]) -> Spec:
    spec = _spec(operation, comment, "ShapeMismatch", SMALL, (3,))
    change = {name: integers(comment, shape)}
    return refused(spec, comment, "ShapeMismatch", **change)


def _spec(
    operation: str, comment: str, flags: str, sizes: Sizes, rows: tuple[int, ...]
) -> Spec:
    return whole(operation, comment, flags, _shapes(operation, sizes, rows), {})


def _shapes(operation: str, sizes: Sizes, rows: tuple[int, ...]) -> Shapes:
    in_features, out_features = sizes
    return layer(operation, rows, {"W": (out_features, in_features)})
