"""Cases of vera_projections, vera_forward, vera_backward and vera_merge."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.cases import File, Spec, any_zero, gaussian, integers
from minipeft.golden.tensors import Array
from minipeft.golden.vectors import Note

Sizes = tuple[int, int, int]  # in_features, out_features, r
SMALL: Sizes = (6, 5, 3)

NOTES = {
    "Stream": Note(
        "CONVENTION",
        "A, then B, from one MT19937 stream seeded like torch's CPU generator: the low "
        "24 bits of each word, scaled and shifted with one rounding to float32.",
        "Other projections: an adapter that stores only its seed is another adapter.",
        (
            "https://github.com/huggingface/peft/pull/1039",
            "https://github.com/huggingface/peft/pull/1564",
        ),
    ),
    "Rounding": Note(
        "NUMERICS",
        "Scaling and shifting round once, as a fused multiply-add does.",
        "With two roundings about half of all numbers are off by one last bit.",
        (),
    ),
    "Basic": Note(
        "BASIC",
        "A frozen random pair, and two trained vectors: diag(b) B diag(d) A.",
        "Adapters of any other library give other results here.",
        ("https://arxiv.org/abs/2310.11454",),
    ),
    "Shared": Note(
        "CONVENTION",
        "The pair is larger than the layer, which uses its top left corners.",
        "A layer that draws a pair of its own, or uses other corners.",
        (),
    ),
    "Unscaled": Note(
        "CONVENTION",
        "There is no alpha: d and b alone scale the update.",
        "A scaling of alpha/r sneaks in from LoRA.",
        (),
    ),
    "Bias": Note("CONVENTION", "The bias is added once.", "b scales the bias.", ()),
    "ZeroB": Note(
        "EDGE_CASE",
        "b is zero, as at the start of training: the output is that of the base.",
        "d starts at zero as well, and nothing ever trains.",
        (),
    ),
    "LeadingAxes": Note(
        "EDGE_CASE",
        "x has no, one or more axes before in_features; gradients sum over them all.",
        "Only the first axis is summed, or a vector is taken for a matrix.",
        (),
    ),
    "Normal": Note(
        "NUMERICS",
        "Normal values: any order of summation stays within the bound.",
        "TF32 or half precision inside, though the tensors are float32.",
        (),
    ),
    "ShapeMismatch": Note(
        "EDGE_CASE",
        "The pair is smaller than the layer, or a vector does not fit it.",
        "Broadcasting turns the mistake into numbers.",
        (),
    ),
    "OutOfRange": Note(
        "EDGE_CASE", "r is 0, or the seed is none.", "An empty pair, silently.", ()
    ),
}


def files() -> Iterator[File]:
    """Yield the four files of the row."""
    headers = {
        "projections": (
            "A (r, in_features), then B (out_features, r), uniform in",
            "[-sqrt(6/n), sqrt(6/n)) with n the number of columns.",
        ),
        "forward": ("y = x W^T + bias + b * ((d * (x A^T)) B^T), elementwise *.",),
        "backward": (
            "With e = (grad_y * b) B and h = x A^T: grad_x = grad_y W + (e * d) A,",
            "grad_d = sum of e * h, grad_b = sum of grad_y * ((d * h) B^T).",
        ),
        "merge": ("merged = W + diag(b) B diag(d) A.",),
    }
    for verb, header in headers.items():
        specs = _projections() if verb == "projections" else _cases(f"vera_{verb}")
        yield File(
            operation=f"vera_{verb}",
            header=header,
            source=f"minipeft.reference.vera.{verb}",
            notes=NOTES,
            specs=[*specs],
        )


def _projections() -> Iterator[Spec]:
    for comment, seed, sizes in [
        ("the seed that peft uses by default", 0, (7, 5, 4)),
        ("another seed", 42, (7, 5, 4)),
        ("the largest seed", 2**32 - 1, (3, 4, 2)),
        ("wider: the first row of A alone begins alike", 42, (9, 5, 4)),
        ("taller: A and the first rows of B are the same", 42, (7, 8, 4)),
        ("more than one block of the generator", 1, (33, 19, 16)),
    ]:
        yield Spec(comment, ("Stream", "Rounding"), {}, _parameters(seed, sizes))
    yield _refused("r is 0", 0, (6, 5, 0))
    yield _refused("a negative seed", -1, SMALL)
    yield _refused("a seed of 33 bits", 2**32, SMALL)


def _parameters(seed: int, sizes: Sizes) -> dict[str, int]:
    in_features, out_features, r = sizes
    names = {"in_features": in_features, "out_features": out_features}
    return {"seed": seed, "r": r} | names


def _refused(comment: str, seed: int, sizes: Sizes) -> Spec:
    parameters = _parameters(seed, sizes)
    return Spec(comment, ("OutOfRange",), {}, parameters, result="invalid")


def _cases(operation: str) -> Iterator[Spec]:
    for comment, flags, sizes in [
        ("6 in, 5 out, r 3", "Basic Unscaled", SMALL),
        ("wide: 9 in, 3 out, r 2", "Basic", (9, 3, 2)),
        ("r larger than either side", "Basic Unscaled", (3, 4, 7)),
        ("square: 4 in, 4 out, r 4", "Basic", (4, 4, 4)),
    ]:
        yield _spec(operation, comment, flags, sizes)
    spec = _spec(operation, "a pair for larger layers", "Shared", SMALL)
    larger = {"A": integers("larger A", (3, 8)), "B": integers("larger B", (9, 3))}
    yield replace(spec, inputs={**spec.inputs, **larger})
    spec = _spec(operation, "b is zero", "ZeroB", SMALL)
    yield replace(spec, inputs={**spec.inputs, "b": np.zeros(5, np.float32)})
    if operation != "vera_merge":
        for comment, rows in [("x is a vector", ()), ("two leading axes", (2, 2))]:
            yield _spec(operation, comment, "LeadingAxes", SMALL, rows)
    if operation == "vera_forward":
        spec = _spec(operation, "with bias", "Bias", SMALL)
        yield replace(spec, inputs={**spec.inputs, "bias": integers("vera bias", (5,))})
    yield _normal(operation, (15, 8, 5))
    for name, shape in [("A", (3, 5)), ("B", (4, 3)), ("d", (2,)), ("b", (4,))]:
        comment = f"{name} is one short"
        spec = _spec(operation, comment, "ShapeMismatch", SMALL)
        inputs = {**spec.inputs, name: integers(comment, shape)}
        yield replace(spec, inputs=inputs, result="invalid")


def _shapes(
    operation: str, sizes: Sizes, rows: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    in_features, out_features, r = sizes
    weights: dict[str, tuple[int, ...]] = {
        "W": (out_features, in_features),
        "A": (r, in_features),
        "B": (out_features, r),
        "d": (r,),
        "b": (out_features,),
    }
    if operation == "vera_merge":
        return weights
    x = {"x": (*rows, in_features)}
    grad_y = {"grad_y": (*rows, out_features)} if operation == "vera_backward" else {}
    return grad_y | x | weights


def _spec(
    operation: str, comment: str, flags: str, sizes: Sizes, rows: tuple[int, ...] = (2,)
) -> Spec:
    seed, inputs = f"{operation} {comment}", dict[str, Array]()
    for name, shape in _shapes(operation, sizes, rows).items():
        inputs[name] = integers(f"{seed} {name}", shape)
    spec = Spec(comment, tuple(flags.split()), inputs, {})
    return spec if rows else any_zero(operation, spec)  # a product is the whole sum


def _normal(operation: str, sizes: Sizes) -> Spec:
    """Compared with a bound: the three sums, the positions, and 6 roundings more."""
    seed, rows = f"{operation} {sizes}", 4
    shapes = _shapes(operation, sizes, (rows,))
    outputs = {
        "vera_forward": ("y",),
        "vera_backward": ("grad_x", "grad_d", "grad_b"),
        "vera_merge": ("merged",),
    }[operation]
    return Spec(
        comment="normal values, {} in, {} out, r {}".format(*sizes),
        flags=("Normal",),
        inputs={name: gaussian(f"{seed} {name}", s) for name, s in shapes.items()},
        parameters={},
        roundings=dict.fromkeys(outputs, sum(sizes) + rows + 6),
    )
