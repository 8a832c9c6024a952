"""Cases of dora_forward, dora_backward and dora_merge.

For outputs that are compared as bytes, every row of V = W + s B A holds whole numbers
and has a power of two as its length. Then the norm, the division by the norm and every
sum are exact, in every order and by every formula.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np

from minipeft.golden.cases import (
    Alternative,
    File,
    Named,
    Spec,
    any_zero,
    gaussian,
    integers,
    reference,
)
from minipeft.golden.cases.build import (
    Shapes,
    bounded,
    drawn,
    either,
    given,
    layer,
    misfits,
    normal,
    refused,
)
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
    old = [*_old(operation), *_invalid(operation)]
    specs = old if operation != "dora_backward" else [_attached(spec) for spec in old]
    yield from specs
    if operation != "dora_backward":
        yield _just_below_zero(operation)
    fine = _exact(operation, "fits", "ShapeMismatch", SMALL, 4)
    if operation == "dora_forward":
        fine = given(fine, bias=integers("dora fits", SMALL[1:2]))
    yield from misfits(operation, fine, old)


def _old(operation: str) -> Iterator[Spec]:
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
            yield given(spec, bias=integers(f"dora {spec.comment}", (5,), 16))
    for sizes, numerator in [((15, 8, 3), 5.0), ((7, 18, 5), 0.3)]:
        yield _normal(operation, sizes, numerator)


def _edges(operation: str) -> Iterator[Spec]:
    spec = _exact(operation, "row 2 of the sum is zero", "ZeroRow", SMALL, 4)
    s, A, B = F32(2), spec.inputs["A"], spec.inputs["B"]
    W = spec.inputs["W"].copy()
    W[2] = -s * (B[2] @ A)
    yield any_zero(operation, given(spec, W=W))
    spec = _exact(operation, "row 1 of W and of B is zero", "ZeroRow", SMALL, 4)
    W, B = spec.inputs["W"].copy(), spec.inputs["B"].copy()
    W[1], B[1] = 0, 0
    yield any_zero(operation, given(spec, W=W, B=B))
    spec = _exact(operation, "magnitude 3 is zero", "ZeroMagnitude", SMALL, 4)
    magnitude = spec.inputs["magnitude"].copy()
    magnitude[3] = 0
    yield any_zero(operation, given(spec, magnitude=magnitude))
    spec = _exact(operation, "every magnitude is negative", "Negative", SMALL, 4)
    yield given(spec, magnitude=-np.abs(spec.inputs["magnitude"]))
    spec = _exact(operation, "a new adapter", "Start", SMALL, 4)
    V = spec.inputs["W"] + F32(2) * (spec.inputs["B"] @ spec.inputs["A"])
    B, norm = np.zeros_like(spec.inputs["B"]), np.linalg.norm(V, axis=1)
    spec = given(spec, W=V, B=B, magnitude=norm)
    # Every term of A's gradient is 0 or -0.
    yield any_zero(operation, spec) if operation == "dora_backward" else spec


def _exact(
    operation: str,
    comment: str,
    flags: str,
    sizes: Sizes,
    alpha: float,
    rows: tuple[int, ...] = (2,),
) -> Spec:
    seed, shapes = f"{operation} {comment}", _shapes(operation, sizes, rows)
    inputs = drawn(integers, seed, shapes)
    V = _rows_of_known_length(seed, (sizes[1], sizes[0]))
    inputs["W"] = V - F32(alpha / sizes[2]) * (inputs["B"] @ inputs["A"])
    return Spec(comment, tuple(flags.split()), inputs, {"alpha": alpha})


def _shapes(operation: str, sizes: Sizes, rows: tuple[int, ...]) -> Shapes:
    in_features, out_features, r = sizes
    weights = {
        "W": (out_features, in_features),
        "A": (r, in_features),
        "B": (out_features, r),
        "magnitude": (out_features,),
    }
    return layer(operation, rows, weights)


def _rows_of_known_length(seed: str, shape: tuple[int, int]) -> Array:
    """Rows of whole numbers whose length is a power of two: signs and places drawn."""
    signs, keys = np.sign(integers(seed, shape)), gaussian(f"{seed} places", shape)
    known = np.array([ROWS[shape[1]][i % 2] for i in range(shape[0])], F32)
    return np.asarray(np.take_along_axis(known, np.argsort(keys), axis=1) * signs)


def _just_below_zero(operation: str) -> Spec:
    """Make every row cancel exactly, though the terms of its squared norm are rounded.

    x, A and B are whole numbers small enough for exact sums of products; squares are
    not. The squared norm comes out below zero in several rows, from A and B or from
    their product.
    """
    comment = "all rows cancel, and their squares are rounded"
    for attempt in count():
        spec = _exact(operation, f"{comment} {attempt}", "NormBelowZero", SMALL, 6)
        A = integers(f"{operation} cancel {attempt}", (2, SMALL[0]), 2**10)
        update, s = spec.inputs["B"] @ A, F32(3)
        W = -s * update
        thin = dora.squared_row_norm(W, lora.LoRA(A, spec.inputs["B"], 3.0))
        whole = np.vecdot(W, W) + 2 * s * np.vecdot(W, update)
        whole += s * s * np.vecdot(update, update)
        if (thin < 0).sum() > 1 < (whole < 0).sum():
            spec = replace(given(spec, A=A, W=W), comment=comment)
            return any_zero(operation, spec)
    raise AssertionError("unreachable: attempts never end")


def _normal(operation: str, sizes: Sizes, alpha: float) -> Spec:
    """Compared with a bound: roundings, and how far the norm magnifies them."""
    in_features, out_features, r = sizes
    seed, rows = f"{operation} {sizes} {alpha}", 4
    comment = f"normal values, {in_features} in, {out_features} out, r {r}"
    shapes = _shapes(operation, sizes, (rows,))
    spec = normal(seed, comment, "Normal Detached", shapes, {"alpha": alpha})
    spec = given(spec, magnitude=gaussian(f"{seed} magnitude", (out_features,), 3.0))
    magnitudes = _magnitudes(spec.inputs, alpha / r)
    roundings = _roundings(sizes, rows)
    return replace(bounded(operation, spec, roundings), magnitudes=magnitudes)


def _roundings(sizes: Sizes, rows: int) -> int:
    # The longest chain: the norm (sums of in_features and twice r, 8 more), the sums of
    # LoRA (in or out features, r, rows), the gain, and the output of the vector.
    return 2 * max(sizes[:2]) + 3 * sizes[2] + rows + 16


def _attached(spec: Spec) -> Spec:
    """Accept the gradient of the norm as well: it takes off what lies along the row.

    grad_V_i = g_i (T_i - u_i <u_i, T_i>) with T = G^T x and u_i = V_i / |V_i|.
    """
    if spec.result != "valid":
        return spec
    wide = {name: array.astype(np.float64) for name, array in spec.inputs.items()}
    s = spec.parameters["alpha"] / len(wide["A"])
    exact = dict(reference("dora_backward", wide, spec.parameters))
    sizes = dict(_magnitudes(spec.inputs, s))
    for change, found, sign, parts in (
        (_along(wide, s), exact, -1, wide),
        (_along(wide, s, size=True), sizes, 1, {k: abs(v) for k, v in wide.items()}),
    ):
        factor = sign * (s if sign < 0 else abs(s))
        found["grad_A"] = found["grad_A"] + factor * parts["B"].T @ change
        found["grad_B"] = found["grad_B"] + factor * change @ parts["A"].T
    outputs = {name: array.astype(F32) for name, array in exact.items()}
    rows = wide["x"].size // wide["x"].shape[-1]
    r, in_features = wide["A"].shape
    n = 2 * _roundings((in_features, len(wide["W"]), r), rows)
    way = Alternative("norm-not-detached", outputs, dict.fromkeys(outputs, n), sizes)
    return either(spec, way)


def _along(wide: Named, s: float, size: bool = False) -> Array:
    """Return g_i u_i <u_i, T_i>, or a bound of its terms in absolute value."""
    W, A, B, m, G, x = (wide[n] for n in ("W", "A", "B", "magnitude", "grad_y", "x"))
    norm = dora.row_norm(W, lora.LoRA(A, B, s))
    V: Array = W + s * B @ A
    condition: Array = np.ones((len(W), 1))
    G, x = G.reshape(-1, len(W)), x.reshape(-1, W.shape[1])
    if size:
        V, m, G, x = abs(W) + abs(s) * abs(B) @ abs(A), abs(m), abs(G), abs(x)
        squares = dora.squared_row_norm(abs(W), lora.LoRA(abs(A), abs(B), abs(s)))
        condition = dora.over_norm(squares, norm**2)[:, np.newaxis]
    u = dora.over_norm(np.ones_like(norm), norm)[:, np.newaxis] * V
    shared = (u * (G.T @ x)).sum(axis=1, keepdims=True)
    along: Array = dora.over_norm(m, norm)[:, np.newaxis] * u * shared * condition
    return along


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
    condition = dora.over_norm(dora.squared_row_norm(abs(W), absolute), norm**2)
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
        change = {name: integers(comment, shape)}
        yield refused(spec, comment, "ShapeMismatch", **change)
