"""Cases of pissa_init and pissa_to_lora.

The weights are sums of outer products of orthogonal columns of ±1, so that their SVD is
known without computing one: base and principal part are whole numbers.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from minipeft.golden.cases import File, Spec, gaussian, integers
from minipeft.golden.cases.build import bounded, misfits, refused, whole
from minipeft.golden.tensors import Array

PAPERS = ("https://arxiv.org/abs/2404.02948",)


def files() -> Iterator[File]:
    """Yield the two files of the row."""
    yield File(
        operation="pissa_init",
        header=(
            "W = U S V^T; delta = U_r S_r V_r^T = s B A; s = alpha/r; base = W - delta",
            "Signs and order of the singular vectors are free, so delta is compared.",
        ),
        source="minipeft.reference.pissa.init",
        papers=PAPERS,
        specs=[*_init()],
    )
    yield File(
        operation="pissa_to_lora",
        header=("A' = [A; A_0], B' = [B, -B_0]; the scaling stays.",),
        source="minipeft.reference.pissa.to_lora",
        papers=PAPERS,
        specs=[*_to_lora()],
    )


def _init() -> Iterator[Spec]:
    for comment, flags, shape, sigma, r, alpha in [
        ("scaling 2", "Basic Scaling", (8, 4), (8, 4, 2, 1), 2, 4),
        ("scaling 1/4", "Scaling", (8, 4), (8, 4, 2, 1), 2, 0.5),
        ("scaling 16", "Scaling", (4, 8), (9, 5, 2, 1), 2, 32),
        ("r 1, scaling 3", "Scaling", (16, 8), (7, 3, 2, 1, 1), 1, 3),
        ("r 3, scaling 2", "Basic", (16, 8), (9, 7, 5, 1, 1, 1), 3, 6),
        ("square", "Basic", (8, 8), (6, 4, 1, 1), 2, 8),
        ("nothing is left", "FullRank", (8, 4), (8, 4, 2, 1), 4, 8),
        ("rank 2, r 2", "LowRank", (8, 4), (5, 3), 2, 4),
        ("rank 1, r 3", "LowRank", (8, 4), (5,), 3, 6),
        ("zeros", "LowRank", (8, 4), (), 2, 4),
    ]:
        yield _known(comment, flags, _orthogonal(shape, sigma), r, alpha)
    fine = _known("", "Basic", _orthogonal((8, 4), (8, 4, 2, 1)), 2, 4)
    for comment, flags, change in [
        ("r is 0", "ZeroRank", {"r": 0}),
        ("r is 5, and W has 4 columns", "ExcessiveRank", {"r": 5}),
        ("alpha is 0", "InvalidAlpha", {"alpha": 0}),
        ("alpha is -4", "InvalidAlpha", {"alpha": -4}),
    ]:
        yield refused(fine, comment, flags, **change)
    for bad in (np.nan, np.inf):
        W = fine.inputs["W"].copy()
        W[2, 1] = bad
        yield refused(fine, f"{bad}", "NotFinite", W=W)
    for shape, r, alpha in (((9, 6), 2, 3.0), ((5, 11), 3, 0.7)):
        yield _normal(gaussian(f"pissa {shape}", shape, 0.05), r, alpha)
    wide = _known("", "Basic", _orthogonal((4, 8), (8, 4, 2, 1)), 2, 4)
    yield refused(wide, "r is 5, and W has 4 rows", "ExcessiveRank", r=5)


def _normal(W: Array, r: int, alpha: float) -> Spec:
    """Split normal values, whose singular values lie close."""
    U, S, Vt = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    delta = (U[:, :r] * S[:r]) @ Vt[:r]
    outputs = {"base": W - delta, "delta": delta}
    comment = "normal values, {} in, {} out, r {}".format(*W.shape[::-1], r)
    return _bounded(
        Spec(
            comment=comment,
            flags=("Normal", "Scaling"),
            inputs={"W": W},
            parameters={"r": r, "alpha": alpha},
            outputs={name: array.astype(np.float32) for name, array in outputs.items()},
        ),
        [float(value) for value in S],
    )


def _bounded(spec: Spec, S: list[float]) -> Spec:
    """Compare with a bound, given the singular values.

    LAPACK errs by a modest multiple of u |W|, and a subspace turns by that over the gap
    below it (Davis, Kahan).
    """
    W, r = spec.inputs["W"], spec.parameters["r"]
    S = [*S, 0.0]
    turn = 1 + S[0] / (S[r - 1] - S[r]) if S[r - 1] > S[r] else 1.0
    size = np.full(W.shape, (float(np.linalg.norm(W)) or 1.0) * turn)
    magnitudes = {"base": size, "delta": size}
    return replace(bounded("pissa_init", spec, 8 * sum(W.shape)), magnitudes=magnitudes)


def _known(comment: str, flags: str, parts: list[Array], r: int, alpha: float) -> Spec:
    delta = sum(parts[:r], np.zeros_like(parts[0]))
    W = sum(parts, np.zeros_like(parts[0]))
    S = [float(np.linalg.norm(part)) for part in parts[:-1]] + [0.0] * (r + 1)
    return _bounded(
        Spec(
            comment=comment,
            flags=tuple(flags.split()),
            inputs={"W": W},
            parameters={"r": r, "alpha": alpha},
            outputs={"base": W - delta, "delta": delta},
        ),
        S,
    )


def _orthogonal(shape: tuple[int, int], sigma: tuple[int, ...]) -> list[Array]:
    """Return the terms of the SVD, whole numbers, and a last one of zeros."""
    U, V = _hadamard(shape[0]), _hadamard(shape[1])
    terms = [s * np.outer(U[i], V[i]) for i, s in enumerate(sigma)]
    return [*(t.astype(np.float32) for t in terms), np.zeros(shape, np.float32)]


def _hadamard(n: int) -> Any:
    H = np.ones((1, 1), np.int64)
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    return H


def _to_lora() -> Iterator[Spec]:
    for comment, (d, k, r) in {
        "wide": (3, 7, 2),
        "tall": (7, 3, 2),
        "r 1": (4, 5, 1),
        "square, r 4: no shape error can help": (4, 4, 4),
    }.items():
        shapes = {"A": (r, k), "B": (d, r), "A_0": (r, k), "B_0": (d, r)}
        inputs = {n: integers(f"{comment} {n}", shape) for n, shape in shapes.items()}
        yield Spec(comment, ("Conversion",), inputs, {})
    shapes = {"A": (2, 7), "B": (3, 2), "A_0": (2, 7), "B_0": (3, 2)}
    fine = whole("pissa_to_lora", "fits", "ShapeMismatch", shapes, {})
    yield from misfits("pissa_to_lora", fine, ())
    drawn = {n: gaussian(f"to lora {n}", shape) for n, shape in shapes.items()}
    yield Spec("normal values", ("Conversion", "Normal"), drawn, {})
