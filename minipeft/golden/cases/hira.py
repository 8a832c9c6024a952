"""Cases of hira_forward, hira_backward and hira_merge."""

from collections.abc import Iterator

import numpy as np

from minipeft.golden.cases import File, Spec, integers
from minipeft.golden.cases.build import (
    Shapes,
    bounded,
    either_zero,
    given,
    layer,
    misfits,
    normal,
    refused,
    whole,
)

PAPERS = ("https://openreview.net/forum?id=TwJrTz9cRS",)

Sizes = tuple[int, int, int]  # in_features, out_features, r
SMALL: Sizes = (6, 5, 2)


def files() -> Iterator[File]:
    """Yield the three files of the row."""
    for verb, header in {
        "forward": ("y = x W^T + bias + scaling * x (W * (B A))^T, elementwise *.",),
        "backward": (
            "With M = scaling * (grad_y^T x) * W, elementwise *: grad_A = B^T M,",
            "grad_B = M A^T, grad_x = grad_y (W + scaling * W * (B A)).",
        ),
        "merge": ("merged = W + scaling * W * (B A), elementwise *.",),
    }.items():
        old = list(_cases(f"hira_{verb}"))
        yield File(
            operation=f"hira_{verb}",
            header=header,
            source=f"minipeft.reference.hira.{verb}",
            papers=PAPERS,
            specs=[*old, *_misfits(f"hira_{verb}", old)],
        )


def _cases(operation: str) -> Iterator[Spec]:
    for comment, flags, sizes, scaling in [
        ("6 in, 5 out, r 2", "Basic", SMALL, 1),
        ("scaling 2", "Scaling", SMALL, 2),
        ("scaling -1/4", "Scaling", SMALL, -0.25),
        ("wide: 9 in, 3 out, r 2", "Orientation", (9, 3, 2), 2),
        ("tall: 3 in, 9 out, r 2", "Orientation", (3, 9, 2), 2),
        ("square: 4 in, 4 out, r 4", "SquareTrap", (4, 4, 4), 2),
        ("6 in, 5 out, r 1", "RankOne", (6, 5, 1), 2),
    ]:
        yield _spec(operation, comment, flags, sizes, scaling)
    spec = _spec(operation, "B is zero", "Start", SMALL, 2)
    yield either_zero(operation, given(spec, B=np.zeros((5, 2), np.float32)))
    if operation != "hira_merge":
        for comment, rows in [("x is a vector", ()), ("two leading axes", (2, 2))]:
            yield _spec(operation, comment, "LeadingAxes", SMALL, 2, rows)
    if operation == "hira_forward":
        spec = _spec(operation, "with bias", "Bias", SMALL, 2)
        yield given(spec, bias=integers("hira bias", (5,)))
    yield _normal(operation, (15, 8, 3))
    if operation == "hira_merge":
        fine = _spec(operation, "", "", SMALL, 2)
        empty = {"A": np.zeros((0, 6), np.float32), "B": np.zeros((5, 0), np.float32)}
        yield refused(fine, "r is 0", "ZeroRank", **empty)


def _misfits(operation: str, old: list[Spec]) -> Iterator[Spec]:
    fine = _spec(operation, "fits", "ShapeMismatch", SMALL, 2)
    if operation == "hira_forward":
        fine = given(fine, bias=integers("hira fits", (5,)))
    yield from misfits(operation, fine, old)


def _shapes(operation: str, sizes: Sizes, rows: tuple[int, ...]) -> Shapes:
    in_features, out_features, r = sizes
    weights = {
        "W": (out_features, in_features),
        "A": (r, in_features),
        "B": (out_features, r),
    }
    return layer(operation, rows, weights)


def _spec(
    operation: str,
    comment: str,
    flags: str,
    sizes: Sizes,
    scaling: float,
    rows: tuple[int, ...] = (2,),
) -> Spec:
    shapes = _shapes(operation, sizes, rows)
    spec = whole(operation, comment, flags, shapes, {"scaling": scaling})
    return either_zero(operation, spec)


def _normal(operation: str, sizes: Sizes) -> Spec:
    """Compared with a bound: the three sums, the positions, and 6 roundings more."""
    rows = 4
    comment = "normal values, {} in, {} out, r {}".format(*sizes)
    shapes, parameters = _shapes(operation, sizes, (rows,)), {"scaling": 0.3}
    flags = "Normal Scaling"
    spec = normal(f"{operation} {sizes}", comment, flags, shapes, parameters)
    return bounded(operation, spec, sum(sizes) + rows + 6)
