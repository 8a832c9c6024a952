"""Cases of miss_forward, miss_backward and miss_merge."""

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

PAPERS = ("https://arxiv.org/abs/2409.15371",)

Sizes = tuple[int, int, int]  # in_features, out_features, r
SMALL: Sizes = (6, 5, 2)


def files() -> Iterator[File]:
    """Yield the three files of the row."""
    for verb, header in {
        "forward": ("y = x W^T + bias + f D, where f[j] is the sum of all x[i] with",
                    "i mod r = j."),
        "backward": ("grad_D = f^T grad_y, with f as in forward, and",
                     "grad_x[i] = (grad_y W)[i] + (grad_y D^T)[i mod r]."),
        "merge": ("merged[o, i] = W[o, i] + D[i mod r, o].",),
    }.items():  # fmt: skip
        old = list(_cases(f"miss_{verb}"))
        yield File(
            operation=f"miss_{verb}",
            header=header,
            source=f"minipeft.reference.miss.{verb}",
            papers=PAPERS,
            specs=[*old, *_misfits(f"miss_{verb}", old)],
        )


def _cases(operation: str) -> Iterator[Spec]:
    for comment, flags, sizes in [
        ("6 in, 5 out, r 2", "Basic", SMALL),
        ("6 in, 5 out, r 3", "Basic", (6, 5, 3)),
        ("square: 4 in, 4 out, r 4", "SquareTrap", (4, 4, 4)),
        ("square: 4 in, 4 out, r 2", "SquareTrap", (4, 4, 2)),
        ("7 in, 5 out, r 3: one input is left over", "ShortShard", (7, 5, 3)),
        ("8 in, 3 out, r 5: three inputs are left over", "ShortShard", (8, 3, 5)),
        ("6 in, 5 out, r 1", "RankOne", (6, 5, 1)),
    ]:
        yield _spec(operation, comment, flags, sizes)
    spec = _spec(operation, "D is zero", "Start", SMALL)
    yield either_zero(operation, given(spec, D=np.zeros((2, 5), np.float32)))
    if operation != "miss_merge":
        for comment, rows in [("x is a vector", ()), ("two leading axes", (2, 2))]:
            yield _spec(operation, comment, "LeadingAxes", SMALL, rows)
    if operation == "miss_forward":
        spec = _spec(operation, "with bias", "Bias", SMALL)
        yield given(spec, bias=integers("miss bias", (5,)))
    yield _normal(operation, (15, 8, 4))
    if operation == "miss_merge":
        fine, empty = _spec(operation, "", "", SMALL), np.zeros((0, 5), np.float32)
        yield refused(fine, "r is 0", "ZeroRank", D=empty)


def _misfits(operation: str, old: list[Spec]) -> Iterator[Spec]:
    fine = _spec(operation, "fits", "ShapeMismatch", SMALL)
    if operation == "miss_forward":
        fine = given(fine, bias=integers("miss fits", (5,)))
    yield from misfits(operation, fine, old)


def _shapes(operation: str, sizes: Sizes, rows: tuple[int, ...]) -> Shapes:
    in_features, out_features, r = sizes
    weights = {"W": (out_features, in_features), "D": (r, out_features)}
    return layer(operation, rows, weights)


def _spec(
    operation: str, comment: str, flags: str, sizes: Sizes, rows: tuple[int, ...] = (2,)
) -> Spec:
    spec = whole(operation, comment, flags, _shapes(operation, sizes, rows), {})
    return either_zero(operation, spec)


def _normal(operation: str, sizes: Sizes) -> Spec:
    """Compared with a bound: the three sums, the positions, and 4 roundings more."""
    rows = 4
    comment = "normal values, {} in, {} out, r {}".format(*sizes)
    shapes = _shapes(operation, sizes, (rows,))
    spec = normal(f"{operation} {sizes}", comment, "Normal ShortShard", shapes, {})
    return bounded(operation, spec, sum(sizes) + rows + 4)
