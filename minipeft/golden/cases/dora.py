"""Cases of dora_forward, dora_backward and dora_merge.

Where outputs are compared as bytes, W is made so that every row of V = W + s B A holds
whole numbers and has a power of two as its length: then the norm, the division by it
and every sum are exact, in whatever order and by whatever formula.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.cases import File, Named, Spec, any_zero, gaussian, integers
from minipeft.golden.tensors import Array
from minipeft.reference import dora, lora

PAPERS = ("https://arxiv.org/abs/2402.09353",)

F32 = np.float32

Sizes = tuple[int, int, int]  # in_features, out_features, r
SMALL: Sizes = (7, 5, 2)

# Rows of length 4, 8 and 16, by the number of their columns.
ROWS = {
    5: ((1, 1, 1, 2, 3), (2, 2, 2, 4, 6)),
    6: ((5, 4, 3, 3, 2, 1), (10, 8, 6, 6, 4, 2)),
    7: ((1, 1, 1, 1, 2, 2, 2), (7, 1, 1, 1, 2, 2, 2)),
    9: ((4, 4, 3, 3, 2, 2, 2, 1, 1), (8, 8, 6, 6, 4, 4, 4, 2, 2)),
}


def files() -> Iterator[File]:
    """Yield the three files of the row."""
    yield File(
        operation="dora_forward",
        header=(
            "y_i = m_i / |V_i| * (V x)_i + bias_i with V = W + alpha/r B A and |V_i|",
            "the Euclidean norm of row i over in_features; a row of length 0 gives 0.",
        ),
        source="minipeft.reference.dora.forward",
        papers=PAPERS,
        specs=[*_cases("dora_forward")],
    )
    yield File(
        operation="dora_backward",
        header=(
            "The gradients of LoRA for grad_y_i * m_i / |V_i|, and of the magnitude:",
            "sum of grad_y_i * (V x)_i / |V_i|. The norm is a constant.",
        ),
        source="minipeft.reference.dora.backward",
        papers=PAPERS,
        specs=[*_cases("dora_backward")],
    )
    yield File(
        operation="dora_merge",
        header=("merged_i = m_i V_i / |V_i|; a row of length 0 stays 0.",),
        source="minipeft.reference.dora.merge",
        papers=PAPERS,
        specs=[*_cases("dora_merge")],
    )


def _cases(operation: str) -> Iterator[Spec]:
    for comment, flags, sizes, alpha in [
        ("alpha 4, r 2: scaling 2", "Basic Detached", SMALL, 4),
        ("alpha 2, r 4: scaling 1/2", "Scaling NormOfSum", (7, 5, 4), 2),
        ("alpha -8, r 2: scaling -4", "Scaling NormOfSum", SMALL, -8),
        ("wide: 9 in, 3 out", "NormAxis", (9, 3, 2), 8),
        ("tall: 5 in, 9 out", "NormAxis", (5, 9, 2), 8),
        ("square: 5 in, 5 out", "NormAxis SquareTrap", (5, 5, 2), 4),
        ("r 1: scaling 2", "RankOne", (6, 5, 1), 2),
    ]:
        yield _exact(operation, comment, flags, sizes, alpha)
    yield from _edges(operation)
    if operation != "dora_merge":
        for comment, rows in [("x is a vector", ()), ("two leading axes", (2, 2))]:
            yield _exact(operation, comment, "LeadingAxes", SMALL, 4, rows)
    if operation == "dora_forward":
        for spec in (
            _exact(operation, "with bias", "Bias", SMALL, 4),
            _exact(operation, "square, with bias", "Bias SquareTrap", (5, 5, 2), 4),
        ):
            bias = integers(f"dora {spec.comment}", (5,), 16)
            yield replace(spec, inputs={**spec.inputs, "bias": bias})
    for sizes, numerator in [((15, 8, 3), 5.0), ((7, 18, 5), 0.3)]:
        yield _normal(operation, sizes, numerator)
    yield from _invalid(operation)


def _edges(operation: str) -> Iterator[Spec]:
    spec = _exact(operation, "row 2 of the sum is zero", "ZeroRow", SMALL, 4)
    s, A, B = F32(2), spec.inputs["A"], spec.inputs["B"]
    W = spec.inputs["W"].copy()
    W[2] = -s * (B[2] @ A)
    yield any_zero(operation, replace(spec, inputs={**spec.inputs, "W": W}))
    spec = _exact(operation, "row 1 of W and of B is zero", "ZeroRow", SMALL, 4)
    W, B = spec.inputs["W"].copy(), spec.inputs["B"].copy()
    W[1], B[1] = 0, 0
    spec = replace(spec, inputs={**spec.inputs, "W": W, "B": B})
    yield any_zero(operation, spec)
    spec = _exact(operation, "magnitude 3 is zero", "ZeroMagnitude", SMALL, 4)
    magnitude = spec.inputs["magnitude"].copy()
    magnitude[3] = 0
    spec = replace(spec, inputs={**spec.inputs, "magnitude": magnitude})
    yield any_zero(operation, spec)
    spec = _exact(operation, "every magnitude is negative", "Negative", SMALL, 4)
    negative = -np.abs(spec.inputs["magnitude"])
    yield replace(spec, inputs={**spec.inputs, "magnitude": negative})
    spec = _exact(operation, "a new adapter", "Start", SMALL, 4)
    V = spec.inputs["W"] + F32(2) * (spec.inputs["B"] @ spec.inputs["A"])
    B, norm = np.zeros_like(spec.inputs["B"]), np.linalg.norm(V, axis=1)
    yield replace(spec, inputs={**spec.inputs, "W": V, "B": B, "magnitude": norm})


def _exact(
    operation: str,
    comment: str,
    flags: str,
    sizes: Sizes,
    alpha: float,
    rows: tuple[int, ...] = (2,),
) -> Spec:
    in_features, out_features, r = sizes
    seed = f"{operation} {comment}"
    A, B = (
        integers(f"{seed} {name}", shape)
        for name, shape in (("A", (r, in_features)), ("B", (out_features, r)))
    )
    V = _rows_of_known_length(seed, (out_features, in_features))
    W = V - F32(alpha / r) * (B @ A)
    magnitude = integers(f"{seed} magnitude", (out_features,))
    weights = {"W": W, "A": A, "B": B, "magnitude": magnitude}
    inputs = _with_data(operation, integers, seed, sizes, rows) | weights
    return Spec(comment, tuple(flags.split()), inputs, {"alpha": alpha})


def _rows_of_known_length(seed: str, shape: tuple[int, int]) -> Array:
    """Rows of whole numbers whose length is a power of two: signs and places drawn."""
    signs, keys = np.sign(integers(seed, shape)), gaussian(f"{seed} places", shape)
    known = np.array([ROWS[shape[1]][i % 2] for i in range(shape[0])], F32)
    return np.asarray(np.take_along_axis(known, np.argsort(keys), axis=1) * signs)


def _with_data(
    operation: str, draw: object, seed: str, sizes: Sizes, rows: tuple[int, ...]
) -> dict[str, Array]:
    assert callable(draw)
    shapes = {"grad_y": (*rows, sizes[1]), "x": (*rows, sizes[0])}
    wanted = {"dora_forward": ("x",), "dora_backward": ("grad_y", "x")}
    names = wanted.get(operation, ())
    return {name: draw(f"{seed} {name}", shapes[name]) for name in names}


def _normal(operation: str, sizes: Sizes, alpha: float) -> Spec:
    """Compared with a bound: roundings, and how far the norm magnifies them."""
    in_features, out_features, r = sizes
    seed, rows = f"{operation} {sizes} {alpha}", 4
    weights = {
        "W": gaussian(f"{seed} W", (out_features, in_features)),
        "A": gaussian(f"{seed} A", (r, in_features)),
        "B": gaussian(f"{seed} B", (out_features, r)),
        "magnitude": gaussian(f"{seed} magnitude", (out_features,), 3.0),
    }
    inputs = _with_data(operation, gaussian, seed, sizes, (rows,)) | weights
    outputs = {
        "dora_forward": ("y",),
        "dora_backward": ("grad_x", "grad_A", "grad_B", "grad_magnitude"),
        "dora_merge": ("merged",),
    }[operation]
    # The longest way: the norm (sums over in_features and twice r, 8 more), the sums of
    # LoRA (in or out features, r, rows), the gain, and the output of the vector.
    roundings = 2 * max(in_features, out_features) + 3 * r + rows + 16
    return Spec(
        comment=f"normal values, {in_features} in, {out_features} out, r {r}",
        flags=("Normal", "Detached"),
        inputs=inputs,
        parameters={"alpha": alpha},
        roundings=dict.fromkeys(outputs, roundings),
        magnitudes=_magnitudes(inputs, alpha / r),
    )


def _magnitudes(inputs: Named, s: float) -> Named:
    """Bound every output: sums of absolute values, over the true norm.

    The squared norm errs by its roundings times the squares summed in absolute value,
    so relative to itself by those over it: the condition of the row.
    """
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    W, A, B, m = (wide[name] for name in ("W", "A", "B", "magnitude"))
    update = lora.LoRA(A, B, s)
    absolute = lora.LoRA(abs(A), abs(B), abs(s))
    norm = dora.row_norm(W, update)
    condition = dora.squared_row_norm(abs(W), absolute) / norm**2
    sizes = dora.DoRA(abs(A), abs(B), abs(s), abs(m) * condition)
    if "grad_y" in wide:
        G, x = abs(wide["grad_y"]), abs(wide["x"])
        grads = dora._backward(G, x, abs(W), sizes, norm)
        names = ("grad_x", "grad_A", "grad_B")
        bounds = dict(zip(names, grads, strict=False))
        return bounds | {"grad_magnitude": grads.magnitude * condition}
    if "x" in wide:
        return {"y": dora._forward(abs(wide["x"]), abs(W), sizes, None, norm)}
    return {"merged": dora._merge(abs(W), sizes, norm)}


def _invalid(operation: str) -> Iterator[Spec]:
    in_features, out_features, r = SMALL
    for comment, name, shape in [
        ("magnitude is one short", "magnitude", (out_features - 1,)),
        ("magnitude has one number", "magnitude", (1,)),
        ("magnitude is a column", "magnitude", (out_features, 1)),
        ("magnitude has in_features numbers", "magnitude", (in_features,)),
        ("A has r + 1 rows", "A", (r + 1, in_features)),
        ("B is transposed", "B", (r, out_features)),
    ]:
        spec = _exact(operation, comment, "ShapeMismatch", SMALL, 4)
        inputs = {**spec.inputs, name: integers(comment, shape)}
        yield replace(spec, inputs=inputs, result="invalid")
