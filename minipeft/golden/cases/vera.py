"""Cases of vera_projections, vera_forward, vera_backward and vera_merge."""

from collections.abc import Iterator

import numpy as np

from minipeft.golden.cases import File, Spec, any_zero, integers
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

PAPERS = ("https://arxiv.org/abs/2310.11454",)

Sizes = tuple[int, int, int]  # in_features, out_features, r
SMALL: Sizes = (6, 5, 3)


def files() -> Iterator[File]:
    """Yield the four files of the row."""
    headers = {
        "projections": (
            "A (r, in_features), then B (out_features, r), uniform in",
            "[-sqrt(6/n), sqrt(6/n)) with n the number of columns.",
        ),
        "forward": ("y = x W^T + bias + b * ((d * (x A^T)) B^T), elementwise *.",),
        "backward": (
            "With e = (grad_y * b) B and h = x A^T: grad_x = grad_y W + (e * d) A,",
            "grad_d = sum of e * h, grad_b = sum of grad_y * ((d * h) B^T).",
        ),
        "merge": ("merged = W + diag(b) B diag(d) A.",),
    }
    for verb, header in headers.items():
        operation = f"vera_{verb}"
        if verb == "projections":
            specs = list(_projections())
        else:
            old = list(_cases(operation))
            specs = [*old, *_later(operation, old)]
        yield File(
            operation=operation,
            header=header,
            source=f"minipeft.reference.vera.{verb}",
            papers=PAPERS,
            specs=specs,
        )


def _projections() -> Iterator[Spec]:
    for comment, seed, sizes in [
        ("the seed that peft uses by default", 0, (7, 5, 4)),
        ("another seed", 42, (7, 5, 4)),
        ("the largest seed", 2**32 - 1, (3, 4, 2)),
        ("wider: the first row of A alone begins alike", 42, (9, 5, 4)),
        ("taller: A and the first rows of B are the same", 42, (7, 8, 4)),
        ("more than one block of the generator", 1, (33, 19, 16)),
    ]:
        yield Spec(
            comment, ("Stream", "FusedMultiplyAdd"), {}, _parameters(seed, sizes)
        )
    yield _refused("r is 0", "ZeroRank", 0, (6, 5, 0))
    yield _refused("a negative seed", "SeedRange", -1, SMALL)
    yield _refused("a seed of 33 bits", "SeedRange", 2**32, SMALL)


def _parameters(seed: int, sizes: Sizes) -> dict[str, int]:
    in_features, out_features, r = sizes
    names = {"in_features": in_features, "out_features": out_features}
    return {"seed": seed, "r": r} | names


def _refused(comment: str, flag: str, seed: int, sizes: Sizes) -> Spec:
    return refused(Spec("", (), {}, _parameters(seed, sizes)), comment, flag)


def _cases(operation: str) -> Iterator[Spec]:
    for comment, flags, sizes in [
        ("6 in, 5 out, r 3", "Basic Unscaled", SMALL),
        ("wide: 9 in, 3 out, r 2", "Basic", (9, 3, 2)),
        ("r larger than either side", "Basic Unscaled", (3, 4, 7)),
        ("square: 4 in, 4 out, r 4", "Basic", (4, 4, 4)),
    ]:
        yield _spec(operation, comment, flags, sizes)
    spec = _spec(operation, "a pair for larger layers", "Shared", SMALL)
    larger = {"A": integers("larger A", (3, 8)), "B": integers("larger B", (9, 3))}
    yield given(spec, **larger)
    spec = _spec(operation, "b is zero", "Start", SMALL)
    spec = given(spec, b=np.zeros(5, np.float32))
    # Every term of d's gradient is 0 or -0.
    yield any_zero(operation, spec) if operation == "vera_backward" else spec
    if operation != "vera_merge":
        for comment, rows in [("x is a vector", ()), ("two leading axes", (2, 2))]:
            yield _spec(operation, comment, "LeadingAxes", SMALL, rows)
    if operation == "vera_forward":
        spec = _spec(operation, "with bias", "Bias", SMALL)
        yield given(spec, bias=integers("vera bias", (5,)))
    yield _normal(operation, (15, 8, 5))
    for name, shape in [("A", (3, 5)), ("B", (4, 3)), ("d", (2,)), ("b", (4,))]:
        comment = f"{name} is one short"
        spec = _spec(operation, comment, "ShapeMismatch", SMALL)
        change = {name: integers(comment, shape)}
        yield refused(spec, comment, "ShapeMismatch", **change)


def _later(operation: str, old: list[Spec]) -> Iterator[Spec]:
    yield _spec(operation, "6 in, 5 out, r 1", "RankOne Unscaled", (6, 5, 1))
    fine = _spec(operation, "fits, r 1", "ShapeMismatch", (6, 5, 1))
    b = integers(f"{operation} one row", (1, 1))
    yield refused(fine, "B has one row, r 1", "ShapeMismatch RankOne", B=b)
    fine = _spec(operation, "fits", "ShapeMismatch", SMALL)
    if operation == "vera_forward":
        fine = given(fine, bias=integers("vera fits", (5,)))
    yield from misfits(operation, fine, old)


def _shapes(operation: str, sizes: Sizes, rows: tuple[int, ...]) -> Shapes:
    in_features, out_features, r = sizes
    weights = {
        "W": (out_features, in_features),
        "A": (r, in_features),
        "B": (out_features, r),
        "d": (r,),
        "b": (out_features,),
    }
    return layer(operation, rows, weights)


def _spec(
    operation: str, comment: str, flags: str, sizes: Sizes, rows: tuple[int, ...] = (2,)
) -> Spec:
    spec = whole(operation, comment, flags, _shapes(operation, sizes, rows), {})
    return spec if rows else any_zero(operation, spec)  # a product is the whole sum


def _normal(operation: str, sizes: Sizes) -> Spec:
    """Compared with a bound: the three sums, the positions, and 6 roundings more."""
    rows = 4
    comment = "normal values, {} in, {} out, r {}".format(*sizes)
    shapes = _shapes(operation, sizes, (rows,))
    spec = normal(f"{operation} {sizes}", comment, "Normal", shapes, {})
    return bounded(operation, spec, sum(sizes) + rows + 6)
