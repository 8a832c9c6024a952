"""Cases of lora_batched_forward: whole numbers, so that no sum is rounded."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.arguments import NO_ADAPTER
from minipeft.golden.cases import File, Spec, gaussian, integers
from minipeft.golden.cases.build import bounded, drawn, either_zero, given, refused
from minipeft.golden.tensors import Array

PAPERS = ("https://arxiv.org/abs/2310.18547", "https://arxiv.org/abs/2311.03285")
OPERATION = "lora_batched_forward"
F32 = np.float32

Sizes = tuple[int, int, int, int]  # adapters, in_features, out_features, r
SMALL: Sizes = (3, 6, 5, 2)
SCALING = np.array([2, 0.5, -4], F32)


def files() -> Iterator[File]:
    """Yield the file of the row."""
    yield File(
        operation=OPERATION,
        header=(
            "y = x W^T + bias, and for the rows of a request with the adapter i, from",
            "0 on, also s_i (x A_i^T) B_i^T. The index 255 means no adapter.",
        ),
        source="minipeft.reference.lora_batched.forward",
        papers=PAPERS,
        specs=[*_valid(), _normal(), *_refused()],
    )


def _valid() -> Iterator[Spec]:
    yield _spec("each request has another adapter", "Basic OwnAdapter", (2, 0, 1))
    yield _spec("two requests have the same adapter", "OwnAdapter", (1, 2, 1))
    yield _spec("all requests have one adapter", "OwnAdapter", (1, 1, 1))
    none = NO_ADAPTER
    yield _spec("a request without an adapter", "NoAdapter", (2, none, 0))
    yield _spec("no request has an adapter", "NoAdapter", (none, none, none))
    yield _spec("a single request", "OwnAdapter", (2,))
    yield _spec("more requests than adapters", "OwnAdapter", (0, 2, none, 1, 0))
    for comment, rows in [("two rows a request", (2,)), ("one row", (1,))]:
        yield _spec(
            f"{comment}, in an axis of their own", "LeadingAxes", (2, 0, 1), rows
        )
    yield _spec("two axes of rows", "LeadingAxes", (1, none), (2, 2))
    spec = _spec("with bias", "Bias", (2, none, 1))
    yield given(spec, bias=integers("batched bias", (5,), 16))
    yield _square("square weight and updates")
    spec = _spec("r 1", "RankOne", (1, 0), sizes=(2, 6, 5, 1))
    yield spec
    spec = _spec("the last columns of A and B are filled up", "FilledUp", (1, 0, 1))
    A, B = spec.inputs["A"].copy(), spec.inputs["B"].copy()
    A[1, 1:], B[1, :, 1:] = 0, 0
    yield given(spec, A=A, B=B)


def _square(comment: str) -> Spec:
    return _spec(comment, "SquareTrap", (1, 0, 2), sizes=(3, 4, 4, 4))


def _refused() -> Iterator[Spec]:
    fine = _spec("fits", "ShapeMismatch", (2, 0, 1))
    wrong = np.array([2, 3, 1], np.uint8)
    yield refused(fine, "adapter 3 of 3 is asked for", "OutOfRange", indices=wrong)
    for comment, name, shape in [
        ("x is one column short", "x", (3, 5)),
        ("A is one column short", "A", (3, 2, 5)),
        ("B is one row short", "B", (3, 4, 2)),
        ("B has one row", "B", (3, 1, 2)),
        ("A has a row too many", "A", (3, 3, 6)),
        ("B is of one adapter too few", "B", (2, 5, 2)),
        ("A is of one adapter alone", "A", (1, 2, 6)),
        ("scaling is of one adapter alone", "scaling", (1,)),
        ("bias is one short", "bias", (4,)),
        ("bias is one number", "bias", (1,)),
    ]:
        change = {name: np.abs(integers(comment, shape))}
        yield refused(fine, comment, "ShapeMismatch", **change)
    for comment, chosen in [
        ("indices is one short", (2, 0)),
        ("indices is one number", (1,)),
        ("indices is one too long", (2, 0, 1, 1)),
    ]:
        change = {"indices": np.array(chosen, np.uint8)}
        yield refused(fine, comment, "ShapeMismatch", **change)
    zero = _spec("r is 0", "", (1, 0), sizes=(2, 6, 5, 0))
    yield refused(zero, "r is 0", "ZeroRank")


def _spec(
    comment: str,
    flags: str,
    indices: tuple[int, ...],
    rows: tuple[int, ...] = (),
    sizes: Sizes = SMALL,
) -> Spec:
    n, columns, outputs, r = sizes
    shapes = {
        "x": (len(indices), *rows, columns),
        "W": (outputs, columns),
        "A": (n, r, columns),
        "B": (n, outputs, r),
    }
    inputs = drawn(integers, f"{OPERATION} {comment}", shapes)
    inputs |= {"scaling": SCALING[:n], "indices": np.array(indices, np.uint8)}
    spec = Spec(comment, tuple(flags.split()), inputs, {})
    return either_zero(OPERATION, spec) if r else spec


def _normal() -> Spec:
    """Sums over the inputs and over r; six other roundings, as in the cases of lora."""
    shapes = {"x": (4, 7), "W": (8, 7), "A": (3, 3, 7), "B": (3, 8, 3)}
    inputs: dict[str, Array] = drawn(gaussian, "batched normal", shapes)
    inputs["scaling"] = np.array([5 / 3, 0.1, 4 / 3**0.5], F32)
    inputs["indices"] = np.array([2, NO_ADAPTER, 0, 1], np.uint8)
    spec = Spec("normal values, 7 in, 8 out, r 3", ("Normal",), inputs, {})
    return replace(bounded(OPERATION, spec, 7 + 3 + 6), result="valid")
