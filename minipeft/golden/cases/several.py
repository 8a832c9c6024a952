"""Cases of lora_weighted_sum and lora_merge_tied: two adapters, and two layers."""

from collections.abc import Iterator

from minipeft.golden.cases import File, Spec, integers
from minipeft.golden.cases.build import (
    Shapes,
    bounded,
    either_zero,
    given,
    misfits,
    normal,
    refused,
    whole,
)

PAPERS = ("https://arxiv.org/abs/2106.09685",)
TIED = "https://github.com/huggingface/peft/issues/2018"

Sizes = tuple[int, int, int, int]  # in_features, out_features, r, the other's r
SUM, MERGE = "lora_weighted_sum", "lora_merge_tied"
SMALL: Sizes = (6, 5, 2, 3)


def files() -> Iterator[File]:
    """Yield the two files."""
    yield File(
        operation=SUM,
        header=(
            "delta = weight s B A + other_weight s' B' A', with s = alpha/r of each",
            "adapter's own rank. No B meets the A of the other adapter.",
        ),
        source="minipeft.reference.lora.weighted_sum",
        papers=PAPERS,
        specs=list(_sums()),
    )
    yield File(
        operation=MERGE,
        header=(
            "An embedding E, whose head has the same weight, and an adapter on one of",
            "the two: this one becomes E + s B A, with s = alpha/r, the other stays E.",
        ),
        source="minipeft.reference.lora.merge_tied",
        papers=PAPERS,
        specs=list(_tied()),
    )


_SUMS: list[tuple[str, str, Sizes, tuple[float, ...]]] = [
    (
        "ranks 2 and 2, weights 1 and 1",
        "Basic OwnMatrices",
        (6, 5, 2, 2),
        (4, 8, 1, 1),
    ),
    ("ranks 2 and 4", "OwnMatrices OtherRank Scaling", (7, 6, 2, 4), (4, 8, 1, 1)),
    ("ranks 4 and 1", "OwnMatrices OtherRank RankOne", (7, 6, 4, 1), (8, 2, 1, 1)),
    ("weights 1/2 and 2", "OwnMatrices Weights", (6, 5, 2, 2), (4, 8, 0.5, 2)),
    ("weights 1 and -1", "OwnMatrices NegativeWeight", (6, 5, 2, 2), (4, 8, 1, -1)),
    ("both weights are -1", "NegativeWeight", (6, 5, 2, 2), (4, 8, -1, -1)),
    ("a weight is 0", "Weights", (6, 5, 2, 2), (4, 8, 0, 2)),
    ("weights that add up to 3", "Weights", (6, 5, 2, 4), (4, 16, 2, 1)),
    (
        "square: 4 in, 4 out, ranks 4 and 4",
        "SquareTrap",
        (4, 4, 4, 4),
        (8, 2, 1, 2),
    ),
    (
        "the ranks add up to more than any rank",
        "OtherRank",
        (4, 3, 2, 4),
        (4, 8, 1, 1),
    ),
]


def _sums() -> Iterator[Spec]:
    for comment, flags, sizes, numbers in _SUMS:
        names = ("alpha", "other_alpha", "weight", "other_weight")
        parameters = dict(zip(names, numbers, strict=True))
        spec = whole(SUM, comment, flags, _shapes(sizes), parameters)
        yield either_zero(SUM, spec)
    yield _same_twice()
    yield _normal_sum()
    parameters = {"alpha": 4, "other_alpha": 6, "weight": 1, "other_weight": 2}
    fine = whole(SUM, "fits", "ShapeMismatch", _shapes(SMALL), parameters)
    yield from misfits(SUM, fine, [])
    for name, sizes in [("A", (6, 5, 0, 3)), ("other_A", (6, 5, 2, 0))]:
        zero = whole(SUM, "", "", _shapes(sizes), parameters)
        yield refused(zero, f"{name} has no rows: r is 0", "ZeroRank")


def _same_twice() -> Spec:
    """Take the same adapter with opposite weights: nothing is left."""
    parameters = {"alpha": 4, "other_alpha": 4, "weight": 1, "other_weight": -1}
    comment = "an adapter less itself"
    spec = whole(SUM, comment, "NegativeWeight", _shapes((6, 5, 2, 2)), parameters)
    same = {"other_A": spec.inputs["A"], "other_B": spec.inputs["B"]}
    return either_zero(SUM, given(spec, **same))


def _normal_sum() -> Spec:
    """Terms of both ranks; each factor is rounded twice and multiplied by a weight."""
    comment = "normal values, 10 in, 9 out, ranks 3 and 6"
    parameters = {"alpha": 5, "other_alpha": 4, "weight": 0.7, "other_weight": 0.3}
    spec = normal(SUM, comment, "Normal", _shapes((10, 9, 3, 6)), parameters)
    return bounded(SUM, spec, 3 + 6 + 6)


def _shapes(sizes: Sizes) -> Shapes:
    columns, rows, r, q = sizes
    return {
        **{"A": (r, columns), "B": (rows, r)},
        **{"other_A": (q, columns), "other_B": (rows, q)},
    }


def _tied() -> Iterator[Spec]:
    for layer in ("head", "embedding"):
        for comment, flags, sizes, alpha in [
            ("7 tokens, 5 features, r 2", "TiedHead Scaling", (7, 5, 2), 8),
            ("4 tokens, 4 features, r 4", "TiedHead SquareTrap", (4, 4, 4), 8),
            ("r 1", "TiedHead RankOne", (7, 5, 1), 2),
        ]:
            yield _tie(f"{layer}: {comment}", flags, sizes, (alpha, layer))
        spec = _tie(f"{layer}: B is zero", "Start", (7, 5, 2), (8, layer))
        yield given(spec, B=0 * abs(spec.inputs["B"]))
        yield _normal_tie(layer)
        fine = _tie("fits", "ShapeMismatch", (7, 5, 2), (8, layer))
        for comment, name, shape in [
            ("A is transposed", "A", (5, 2)),
            ("B has one row", "B", (1, 2)),
            ("E is transposed", "E", (5, 7)),
        ]:
            change = {name: integers(f"{layer} {comment}", shape)}
            yield refused(fine, f"{layer}: {comment}", "ShapeMismatch", **change)
        zero = _tie("", "", (7, 5, 0), (8, layer))
        yield refused(zero, f"{layer}: r is 0", "ZeroRank")


def _tie(
    comment: str, flags: str, sizes: tuple[int, int, int], set_to: tuple[float, str]
) -> Spec:
    parameters = {"alpha": set_to[0], "layer": set_to[1]}
    spec = whole(MERGE, comment, flags, _table(sizes), parameters)
    return either_zero(MERGE, spec) if sizes[2] else spec


def _normal_tie(layer: str) -> Spec:
    comment = f"{layer}: normal values, 9 tokens, 10 features, r 6"
    parameters = {"alpha": 4, "layer": layer}
    spec = normal(f"{MERGE} {layer}", comment, "Normal", _table((9, 10, 6)), parameters)
    return bounded(MERGE, spec, {"embedding": 6 + 6, "head": 6 + 6})


def _table(sizes: tuple[int, int, int]) -> Shapes:
    tokens, features, r = sizes
    return {"E": (tokens, features), "A": (r, features), "B": (tokens, r)}
