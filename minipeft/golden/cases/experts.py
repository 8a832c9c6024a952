"""Cases of experts_forward, experts_backward and experts_merge.

The number of experts differs from r, so exchanging the two axes is an error.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from minipeft.golden.cases import File, Spec, integers
from minipeft.golden.cases.build import bounded, given, normal, refused, whole
from minipeft.golden.operations import OPERATIONS

PAPERS = ("https://arxiv.org/abs/2106.09685",)

Sizes = tuple[int, int, int, int]  # experts, in_features, out_features, r
SMALL: Sizes = (3, 6, 5, 2)
CHOSEN = (2, 0, 1, 2)


def files() -> Iterator[File]:
    """Yield the three files of the row."""
    yield File(
        operation="experts_forward",
        header=(
            "With e the expert of a token: y = W_e x + bias_e + s B_e (A_e x), with",
            "s = alpha/r, or alpha/sqrt(r) where rank_stabilized is true.",
        ),
        source="minipeft.reference.experts.forward",
        papers=PAPERS,
        specs=[*_tokens("experts_forward"), *_biased(), *_broken("experts_forward")],
    )
    yield File(
        operation="experts_backward",
        header=(
            "With e the expert of a token and g the gradient of its y: grad_x =",
            "W_e^T g + s A_e^T (B_e^T g); grad_A_e sums s (B_e^T g) x^T over the",
            "tokens of e, and grad_B_e sums s g (A_e x)^T. W is frozen.",
        ),
        source="minipeft.reference.experts.backward",
        papers=PAPERS,
        specs=[*_tokens("experts_backward"), *_broken("experts_backward")],
    )
    yield File(
        operation="experts_merge",
        header=("merged_e = W_e + s B_e A_e, for each expert e.",),
        source="minipeft.reference.experts.merge",
        papers=PAPERS,
        specs=[*_stacks("experts_merge"), *_broken("experts_merge")],
    )


def _stacks(operation: str) -> Iterator[Spec]:
    for comment, flags, sizes, alpha, stable in [
        ("3 experts, r 2", "Basic ExpertAxis Scaling", SMALL, 8, False),
        ("2 experts, r 4: scaling 1/2", "ExpertAxis Scaling", (2, 7, 6, 4), 2, False),
        ("4 experts, r 1", "ExpertAxis RankOne", (4, 3, 5, 1), 2, False),
        ("3 experts, r 4: scaling 4", "RankStabilized", (3, 6, 5, 4), 8, True),
        ("square weights", "SquareTrap", (3, 4, 4, 2), 4, False),
    ]:
        yield _spec(operation, comment, flags, (sizes, alpha, stable))
    yield _normal(operation)


def _tokens(operation: str) -> Iterator[Spec]:
    yield from _stacks(operation)
    for comment, flags, chosen in [
        ("no token for expert 1", "UnusedExpert", (0, 2, 0, 2)),
        ("all tokens for one expert", "RepeatedExpert", (1, 1, 1, 1)),
        ("no tokens", "EmptyBatch", ()),
        ("tokens in two texts", "LeadingAxes", ((0, 1), (2, 1))),
    ]:
        yield _spec(operation, comment, flags, (SMALL, 8, False), np.array(chosen))
    wrong = np.array([0, 3, 1, 2], np.uint8)
    fine = _spec(operation, "", "OutOfRange", (SMALL, 8, False))
    yield refused(fine, "expert 3 of 3 is chosen", "OutOfRange", chosen=wrong)
    short = np.array(CHOSEN[:3], np.uint8)
    yield refused(fine, "chosen is one token short", "ShapeMismatch", chosen=short)


def _biased() -> Iterator[Spec]:
    spec = _spec("experts_forward", "with biases", "Bias", (SMALL, 8, False))
    yield given(spec, bias=integers("experts bias", (3, 5), 16))
    one = integers("one bias", (1, 5), 16)
    comment = "bias is of one expert alone"
    yield refused(spec, comment, "Bias ShapeMismatch", bias=one)


def _broken(operation: str) -> Iterator[Spec]:
    fine = _spec(operation, "", "ShapeMismatch", (SMALL, 8, False))
    for comment, name, shape in [
        ("A is of one expert alone", "A", (1, 2, 6)),
        ("B is of one expert alone", "B", (1, 5, 2)),
        ("W is of one expert alone", "W", (1, 5, 6)),
        ("A has an expert too many", "A", (4, 2, 6)),
        ("A has the axis of experts second", "A", (2, 3, 6)),
        ("B has the axis of experts last", "B", (5, 2, 3)),
        ("B is transposed", "B", (3, 2, 5)),
        ("A is flat, as in a file", "A", (6, 6)),
    ]:
        change = {name: integers(comment, shape)}
        yield refused(fine, comment, "ShapeMismatch", **change)
    zero = _spec(operation, "r is 0", "", ((3, 6, 5, 0), 8, False))
    yield refused(zero, "r is 0", "ZeroRank")


def _spec(
    operation: str,
    comment: str,
    flags: str,
    hyper: tuple[Sizes, float, bool],
    chosen: Any = CHOSEN,
) -> Spec:
    sizes, alpha, stable = hyper
    ids = np.asarray(chosen, np.uint8) % max(sizes[0], 1)
    shapes = _shapes(operation, sizes, ids.shape)
    parameters = {"alpha": alpha, "rank_stabilized": stable}
    spec = whole(operation, comment, flags, shapes, parameters)
    return _with(operation, spec, ids.astype(np.uint8))


def _with(operation: str, spec: Spec, chosen: Any) -> Spec:
    wanted = OPERATIONS[operation].tensors
    inputs = {**spec.inputs, "chosen": chosen}
    ordered = {name: inputs[name] for name in wanted if name in inputs}
    return Spec(spec.comment, spec.flags, ordered, spec.parameters)


def _normal(operation: str) -> Spec:
    """Sums as long as LoRA's of one token; of gradients, over the tokens too."""
    experts, columns, rows, r = sizes = (3, 7, 8, 4)
    others = 6  # as in the cases of lora
    lengths = {
        "y": columns + r,
        "grad_x": rows + r,
        "grad_A": rows + len(CHOSEN),
        "grad_B": columns + len(CHOSEN),
        "merged": r,
    }
    shapes = _shapes(operation, sizes, (len(CHOSEN),))
    comment = f"normal values, {experts} experts, {columns} in, {rows} out, r {r}"
    parameters = {"alpha": 5, "rank_stabilized": False}
    spec = normal(f"{operation} normal", comment, "Normal", shapes, parameters)
    spec = _with(operation, spec, np.array(CHOSEN, np.uint8))
    outputs = OPERATIONS[operation].outputs
    return bounded(operation, spec, {o: lengths[o] + others for o in outputs})


def _shapes(
    operation: str, sizes: Sizes, lead: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    experts, columns, rows, r = sizes
    known = {
        "grad_y": (*lead, rows),
        "x": (*lead, columns),
        "W": (experts, rows, columns),
        "A": (experts, r, columns),
        "B": (experts, rows, r),
    }
    return {n: known[n] for n in OPERATIONS[operation].tensors if n in known}
