"""Helpers for the cases of all rows: whole numbers, normal values, wrong shapes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from minipeft.golden.cases import (
    POLICIES,
    Alternative,
    Named,
    Spec,
    any_zero,
    gaussian,
    integers,
    reference,
)
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import Array

Shapes = Mapping[str, tuple[int, ...]]
Draw = Callable[[str, tuple[int, ...]], Array]


def layer(operation: str, rows: tuple[int, ...], weights: Shapes) -> Shapes:
    """Put the gradient of y and x before the weights, if the operation has them."""
    out_features, in_features = weights["W"]
    data = {"grad_y": (*rows, out_features), "x": (*rows, in_features)}
    wanted = OPERATIONS[operation].tensors
    return {name: data[name] for name in data if name in wanted} | dict(weights)


def drawn(draw: Draw, seed: str, shapes: Shapes) -> dict[str, Array]:
    """Draw every tensor by a seed of its own."""
    return {name: draw(f"{seed} {name}", shape) for name, shape in shapes.items()}


def whole(
    operation: str,
    comment: str,
    flags: str,
    shapes: Shapes,
    parameters: Mapping[str, Any],
) -> Spec:
    """Small whole numbers: sums of products are exact, in any order."""
    inputs = drawn(integers, f"{operation} {comment}", shapes)
    return Spec(comment, tuple(flags.split()), inputs, parameters)


def either_zero(operation: str, spec: Spec) -> Spec:
    """Accept 0 for -0 if an output holds a zero: a factor or the order decides."""
    outputs = reference(operation, spec.inputs, spec.parameters).values()
    zero = any((output == 0).any() for output in outputs)
    return any_zero(operation, spec) if zero else spec


def normal(
    seed: str, comment: str, flags: str, shapes: Shapes, parameters: Mapping[str, Any]
) -> Spec:
    """Normal values, which `bounded` compares."""
    inputs = drawn(gaussian, seed, shapes)
    return Spec(comment, tuple(flags.split()), inputs, parameters)


def bounded(operation: str, spec: Spec, roundings: int | Mapping[str, int]) -> Spec:
    """Compare every output under gamma:n; one n for all of them, or one for each."""
    if isinstance(roundings, int):
        roundings = dict.fromkeys(OPERATIONS[operation].outputs, roundings)
    return replace(spec, roundings=roundings)


def given(spec: Spec, **inputs: Array) -> Spec:
    """Return the case with other inputs, or with a bias."""
    return replace(spec, inputs={**spec.inputs, **inputs})


def doubled(inputs: Named) -> dict[str, Array]:
    """Return the inputs in float64."""
    return {name: array.astype(np.float64) for name, array in inputs.items()}


def absolute(inputs: Named) -> dict[str, Array]:
    """Return the absolute values of the inputs in float64."""
    return {name: np.abs(array) for name, array in doubled(inputs).items()}


def refused(spec: Spec, comment: str, flags: str, **change: Any) -> Spec:
    """Return a case that must be refused, or is refused by policy."""
    tensors = {k: v for k, v in change.items() if isinstance(v, np.ndarray)}
    plain = {k: v for k, v in change.items() if k not in tensors}
    found = tuple(flags.split())
    return Spec(
        comment=comment,
        flags=found,
        inputs={**spec.inputs, **tensors},
        parameters={**spec.parameters, **plain},
        result="policy" if POLICIES & set(found) else "invalid",
    )


def either(spec: Spec, *ways: Alternative) -> Spec:
    """Accept other answers too; leave out those that equal ours."""
    return replace(spec, result="acceptable", alternatives=(*spec.alternatives, *ways))


def misfits(operation: str, fine: Spec, old: Iterable[Spec]) -> Iterator[Spec]:
    """Change one operand at a time, so that it does not fit the others.

    An axis that only one operand has can have any length. Shapes that an older case
    tests are left out.
    """
    invalid = (spec for spec in old if spec.result == "invalid")
    known = {(n, a.shape) for spec in invalid for n, a in spec.inputs.items()}
    for name, array in fine.inputs.items():
        for wrong, shape in _wrong_shapes(array.shape):
            if (name, shape) in known:
                continue
            comment = f"{name} {wrong}"
            # Positive, so that the shape is the only reason to refuse.
            change = np.abs(integers(f"{operation} misfit {comment}", shape))
            if array.dtype == np.uint8:
                change = np.ones(shape, np.uint8)
            spec = refused(fine, comment, "ShapeMismatch", **{name: change})
            if _clash(operation, spec, name):
                yield spec


def _wrong_shapes(shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield one where many belong, one too many, and the transpose."""
    if len(shape) == 1:
        yield "has one number", (1,)
        yield "has one number too many", (shape[0] + 1,)
    if len(shape) == 2:
        rows, columns = shape
        yield "has one row alone", (1, columns)
        yield "has one column alone", (rows, 1)
        yield "has a row too many", (rows + 1, columns)
        yield "has a column too many", (rows, columns + 1)
        yield "has rows for columns", (columns, rows)


def _clash(operation: str, spec: Spec, changed: str) -> bool:
    """Whether an axis of one operand has another length in another operand."""
    sizes: dict[str, int] = {}
    for name, array in spec.inputs.items():
        if name != changed:
            axes = _axes(operation, spec, name)
            sizes |= {a: n for a, n in zip(axes, array.shape, strict=True) if a}
    axes = _axes(operation, spec, changed)
    for axis, size in zip(axes, spec.inputs[changed].shape, strict=True):
        wanted = sizes.get(axis.removeprefix("at least "))
        if wanted is None:
            continue
        if size < wanted or (size > wanted and not axis.startswith("at least ")):
            return True
    return False


def _axes(operation: str, spec: Spec, name: str) -> list[str]:
    """Name the axes of an operand, as the table of operations does."""
    text: str = OPERATIONS[operation].tensors[name].type["axes"]
    ndim = spec.inputs[name].ndim
    if text in ("any", "as W"):
        return [f"axis {i}" for i in range(ndim)]
    side = {"output": "out_features", "input": "in_features"}
    text = text.replace(
        "features of the side", side.get(spec.parameters.get("side", ""), "")
    )
    axes = [axis.strip() for axis in text.strip("(),").split(",")]
    if axes[0] == "...":
        leading = ndim - len(axes) + 1
        axes = [f"leading {i}" for i in range(leading)] + axes[1:]
    return axes
