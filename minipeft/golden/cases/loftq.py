"""Cases of loftq_init: after one alternation, the base is compared as bytes."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from minipeft.golden.cases import File, Spec, gaussian
from minipeft.golden.cases.blockwise.search import midpoints
from minipeft.golden.cases.build import refused
from minipeft.golden.tensors import Array
from minipeft.reference import blockwise
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import NF4

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
    for comment, flag, name, value in [
        ("steps is 0", "OutOfRange", "steps", 0),
        ("r is 0", "ZeroRank", "r", 0),
        ("r is 9, and W has 8 columns", "ExcessiveRank", "r", 9),
        ("alpha is -4", "InvalidAlpha", "alpha", -4),
        ("blocksize is 48", "InvalidBlocksize", "blocksize", 48),
    ]:
        yield refused(fine, comment, flag, **{name: value})
    for steps, best in ((3, 2), (5, 1)):
        yield _alternated(steps, best)
    yield refused(
        _spec("", "", wide, _parameters(2, 4, 16)),
        "r is 7, and W has 6 rows",
        "ExcessiveRank",
        r=7,
    )


def _spec(comment: str, flags: str, W: Array, parameters: dict[str, Any]) -> Spec:
    pair = next(_pairs(W, parameters["r"], parameters["blocksize"]))
    n = 8 * sum(W.shape)
    return Spec(
        comment=comment,
        flags=tuple(flags.split()),
        inputs={"W": W},
        parameters=parameters,
        roundings={"delta": n},
        outputs={
            "packed": pair.q.packed,
            "absmax": pair.q.absmax,
            "delta": pair.delta.astype(np.float32),
        },
        magnitudes={"delta": np.full(W.shape, pair.size)},
    )


def _alternated(steps: int, best: int) -> Spec:
    """Draw a weight for which one of the pairs is clearly the best."""
    for attempt in count():
        W = gaussian(f"loftq {steps} steps {attempt}", (16, 8), 0.05)
        pairs = [*islice(_pairs(W, 2, 16), steps)]
        errors = np.array([pair.error for pair in pairs])
        clear = np.sort(errors)[1] > 1.001 * errors.min()
        safe = min(pair.margin for pair in pairs) > 2.0**-12
        if clear and safe and errors.argmin() == best - 1:
            break
    parameters = _parameters(2, 4, 16) | {"steps": steps}
    spec = _spec(f"{steps} steps, pair {best} is best", "Alternation", W, parameters)
    if best == 1:
        return spec
    pair, before = pairs[best - 1], pairs[best - 2]
    magnitudes = {
        "absmax": pair.q.absmax + before.size,
        "delta": np.full(W.shape, pair.size),
    }
    outputs = {
        "packed": pair.q.packed,
        "absmax": pair.q.absmax,
        "delta": pair.delta.astype(np.float32),
    }
    roundings = dict.fromkeys(magnitudes, spec.roundings["delta"])
    return replace(spec, roundings=roundings, outputs=outputs, magnitudes=magnitudes)


class Pair(NamedTuple):
    """A base, and the best update for its residual."""

    q: Blockwise
    delta: Array
    size: float  # of the update's error, in units of gamma
    error: float
    margin: float  # of the scaled values to the next midpoint of the codebook


def _pairs(W: Array, r: int, blocksize: int) -> Iterator[Pair]:
    """Alternate in float64.

    The SVD errs by a multiple of u times the residual's norm, and its subspaces turn by
    that over the gap. An error of the update before moves absmax by as much, and with
    it the values of a whole block.
    """
    target, size = W.astype(np.float64), 0.0
    while True:
        q = blockwise.quantize(target, blocksize=blocksize)
        base = blockwise.dequantize(q).astype(np.float64)
        rest = W - base
        U, S, Vt = np.linalg.svd(rest, full_matrices=False)
        delta = (U[:, :r] * S[:r]) @ Vt[:r]
        gap = S[r - 1] - (S[r] if r < len(S) else 0)
        scales = np.repeat(q.absmax, blocksize)[: W.size].reshape(W.shape)
        # The values of a block's codes, at most: how much of absmax's error they take.
        taken = sqrt(blocksize) * float(np.abs(base / scales).max())
        carried = taken * size
        size = (float(np.linalg.norm(rest)) + carried) * (1 + S[0] / gap if gap else 1)
        error = float(np.linalg.norm(rest - delta))
        scaled = (target / scales)[..., np.newaxis]
        near = np.abs(scaled - midpoints(NF4)).min()
        yield Pair(q, delta, size, error, float(near))
        target = W - delta


def _parameters(r: int, alpha: float, blocksize: int) -> dict[str, Any]:
    return {"r": r, "alpha": alpha, "blocksize": blocksize, "steps": 1}
