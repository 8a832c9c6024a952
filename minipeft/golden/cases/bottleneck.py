"""Cases of bottleneck_forward and bottleneck_backward."""

from collections.abc import Iterator

import numpy as np

from minipeft.golden.cases import File, Spec, any_zero, integers
from minipeft.golden.cases.build import (
    Shapes,
    bounded,
    given,
    misfits,
    normal,
    refused,
    whole,
)

PAPERS = (
    "https://arxiv.org/abs/1902.00751",
    "https://arxiv.org/abs/2110.04366",
)

SMALL = (6, 3)  # features, bottleneck


def files() -> Iterator[File]:
    """Yield the two files of the row."""
    for verb, header in {
        "forward": ("y = scaling * (ReLU(x down^T + down_bias) up^T + up_bias), the",
                    "change alone: serial placement adds it to x."),
        "backward": ("The gradients of that change; the slope of ReLU at 0 is 0.",),
    }.items():  # fmt: skip
        yield File(
            operation=f"bottleneck_{verb}",
            header=header,
            source=f"minipeft.reference.bottleneck.{verb}",
            papers=PAPERS,
            specs=[*_cases(f"bottleneck_{verb}")],
        )


def _cases(operation: str) -> Iterator[Spec]:
    yield _spec(operation, "6 features, 3 inside", "Basic", 2.0)
    yield _spec(operation, "wider inside", "Basic", 0.5, (3, 5))
    yield _spec(operation, "scaling 1/2", "Scaling", 0.5)
    yield _spec(operation, "scaling -4", "Scaling", -4.0)
    yield _spec(operation, "4 features, 4 inside", "SquareTrap", 2.0, (4, 4))
    for comment, rows in [("x is a vector", ()), ("two leading axes", (2, 2))]:
        yield _spec(operation, comment, "LeadingAxes", 2.0, rows=rows)
    for comment, flag, names in [
        ("down and its bias are zero", "Corner", ("down", "down_bias")),
        ("up and its bias are zero", "Start", ("up", "up_bias")),
    ]:
        spec = _spec(operation, comment, flag, 2.0)
        zeros = {name: np.zeros_like(spec.inputs[name]) for name in names}
        yield any_zero(operation, given(spec, **zeros))
    yield _normal(operation)
    yield from _invalid(operation)
    fine = _spec(operation, "fits", "ShapeMismatch", 2.0)
    yield from misfits(operation, fine, _invalid(operation))


def _invalid(operation: str) -> Iterator[Spec]:
    for name, shape in [
        ("down", (3, 5)),
        ("down_bias", (2,)),
        ("up", (6, 2)),
        ("up_bias", (5,)),
        ("up_bias", (1,)),
    ]:
        comment = f"{name} has shape {shape}"
        spec = _spec(operation, comment, "ShapeMismatch", 2.0)
        change = {name: integers(comment, shape)}
        yield refused(spec, comment, "ShapeMismatch", **change)


def _shapes(operation: str, sizes: tuple[int, int], rows: tuple[int, ...]) -> Shapes:
    features, bottleneck = sizes
    shapes = {
        "x": (*rows, features),
        "down": (bottleneck, features),
        "down_bias": (bottleneck,),
        "up": (features, bottleneck),
        "up_bias": (features,),
    }
    backward = operation == "bottleneck_backward"
    return {"grad_y": (*rows, features)} | shapes if backward else shapes


def _spec(
    operation: str,
    comment: str,
    flags: str,
    scaling: float,
    sizes: tuple[int, int] = SMALL,
    rows: tuple[int, ...] = (3,),
) -> Spec:
    shapes = _shapes(operation, sizes, rows)
    spec = whole(operation, comment, flags, shapes, {"scaling": scaling})
    # Units that are off have gradients of zero, whose sign the order of sums decides.
    return any_zero(operation, spec) if operation == "bottleneck_backward" else spec


def _normal(operation: str) -> Spec:
    """Compared with a bound: two sums each way, the positions, 8 roundings more."""
    sizes, rows = (15, 8), 4
    shapes = _shapes(operation, sizes, (rows,))
    comment = "normal values, 15 features, 8 inside"
    parameters = {"scaling": 1.7}
    seed = f"{operation} normal"
    spec = normal(seed, comment, "Normal Scaling", shapes, parameters)
    # The values say which units are on; none is so near its corner that rounding could.
    before = spec.inputs["x"] @ spec.inputs["down"].T + spec.inputs["down_bias"]
    assert np.abs(before).min() > 2.0**-10
    return bounded(operation, spec, 2 * sum(sizes) + rows + 8)
