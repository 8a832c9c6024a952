"""Cases of loftq_init, one alternation: the base in bytes, the update with a bound."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from minipeft.golden.cases import POLICIES, File, Spec, gaussian
from minipeft.golden.tensors import Array
from minipeft.reference import blockwise

PAPERS = ("https://arxiv.org/abs/2310.08659",)


def files() -> Iterator[File]:
    """Yield the file of the row."""
    yield File(
        operation="loftq_init",
        header=(
            "packed, absmax = NF4 of W; delta = SVD_r(W - Q) = s B A with s = alpha/r.",
            "Of more steps the pair with the smallest error |W - Q - delta| is kept.",
        ),
        source="minipeft.reference.loftq.init",
        papers=PAPERS,
        specs=[*_specs()],
    )


def _specs() -> Iterator[Spec]:
    tall = gaussian("loftq tall", (16, 8), 0.05)
    wide = gaussian("loftq wide", (6, 16), 0.05)
    yield _spec("scaling 2", "Basic Scaling", tall, _parameters(2, 4, 16))
    yield _spec("scaling 1/2", "Scaling", tall, _parameters(2, 1, 16))
    yield _spec("scaling 8", "Scaling", wide, _parameters(1, 8, 32))
    yield _spec("r 3", "Basic", wide, _parameters(3, 9, 64))
    yield _spec("r equals out_features", "FullRank", wide, _parameters(6, 12, 32))
    held = blockwise.dequantize(blockwise.quantize(tall, blocksize=16))
    for steps in (1, 5):
        parameters = _parameters(2, 4, 16) | {"steps": steps}
        yield _spec(f"{steps} steps", "Representable", held, parameters)
    fine = _spec("", "OutOfRange", tall, _parameters(2, 4, 16))
    for comment, flag, change in [
        ("steps is 0", "OutOfRange", {"steps": 0}),
        ("r is 0", "ZeroRank", {"r": 0}),
        ("r is 9, and W has 8 columns", "ExcessiveRank", {"r": 9}),
        ("alpha is -4", "InvalidAlpha", {"alpha": -4}),
        ("blocksize is 48", "InvalidBlocksize", {"blocksize": 48}),
    ]:
        yield replace(
            fine,
            comment=comment,
            flags=(flag,),
            parameters={**fine.parameters, **change},
            result="policy" if flag in POLICIES else "invalid",
            outputs=None,
            roundings={},
            magnitudes=None,
        )


def _spec(comment: str, flags: str, W: Array, parameters: dict[str, Any]) -> Spec:
    q = blockwise.quantize(W, blocksize=parameters["blocksize"])
    rest = (W - blockwise.dequantize(q)).astype(np.float64)
    U, S, Vt = np.linalg.svd(rest, full_matrices=False)
    r = parameters["r"]
    delta = (U[:, :r] * S[:r]) @ Vt[:r]
    # The residual's SVD in float32, and its subspaces turned by that over the gap.
    gap = S[r - 1] - (S[r] if r < len(S) else 0)
    size = float(np.linalg.norm(rest)) * (1 + S[0] / gap if gap else 1)
    return Spec(
        comment=comment,
        flags=tuple(flags.split()),
        inputs={"W": W},
        parameters=parameters,
        roundings={"delta": 8 * sum(W.shape)},
        outputs={
            "packed": q.packed,
            "absmax": q.absmax,
            "delta": delta.astype(np.float32),
        },
        magnitudes={"delta": np.full(W.shape, size)},
    )


def _parameters(r: int, alpha: float, blocksize: int) -> dict[str, Any]:
    return {"r": r, "alpha": alpha, "blocksize": blocksize, "steps": 1}
