"""Cases of prompt_init, prompt_forward and prompt_backward: bytes, but for a sum."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.cases import File, Spec, gaussian, integers
from minipeft.golden.cases.build import misfits, refused, whole

PAPERS = ("https://arxiv.org/abs/2104.08691",)

BATCHES = {
    "one text": ("Basic", ()),
    "a batch of one": ("Basic", (1,)),
    "a batch of three": ("Batch", (3,)),
    "two axes": ("Batch", (2, 2)),
}


def files() -> Iterator[File]:
    """Yield the three files of the row."""
    yield File(
        operation="prompt_init",
        header=("P = E[tokens]: rows of the embedding table.",),
        source="minipeft.reference.prompt.init",
        papers=PAPERS,
        specs=[*_init(), *_strange_tokens()],
    )
    yield File(
        operation="prompt_forward",
        header=("y = [P; X], along the axis of tokens.",),
        source="minipeft.reference.prompt.forward",
        papers=PAPERS,
        specs=[*_forward(), *_misfits("prompt_forward"), _alone("prompt_forward")],
    )
    yield File(
        operation="prompt_backward",
        header=("grad_X is the text's part of grad_y, grad_P the sum of the rest.",),
        source="minipeft.reference.prompt.backward",
        papers=PAPERS,
        specs=[
            *_backward(),
            *_misfits("prompt_backward"),
            _alone("prompt_backward"),
            _normal(),
        ],
    )


def _init() -> Iterator[Spec]:
    E = gaussian("embeddings", (9, 5), 0.02)
    for comment, tokens in {"three": [3, 0, 8], "one, twice": [4, 4]}.items():
        inputs = {"E": E, "tokens": np.array(tokens, np.uint8)}
        yield Spec(comment, ("RealTokens",), inputs, {})
    for comment, tokens in {"token 9 of 9": [1, 9], "none": []}.items():
        inputs = {"E": E, "tokens": np.array(tokens, np.uint8)}
        yield Spec(comment, ("OutOfRange",), inputs, {}, result="invalid")


def _strange_tokens() -> Iterator[Spec]:
    inputs = {
        "E": gaussian("embeddings", (9, 5), 0.02),
        "tokens": np.array([2, 255], np.uint8),
    }
    yield Spec("token 255 of 9", ("OutOfRange",), inputs, {}, result="invalid")


def _misfits(operation: str) -> Iterator[Spec]:
    shapes = {"X": (4, 3), "P": (2, 3)}
    if operation == "prompt_backward":
        shapes = {"grad_y": (6, 3), "P": (2, 3)}
    fine = whole(operation, "fits", "ShapeMismatch", shapes, {})
    yield from misfits(operation, fine, ())
    if operation == "prompt_backward":
        grad_y = integers("shorter than the prompt", (1, 3))
        yield refused(fine, "grad_y is shorter than P", "ShapeMismatch", grad_y=grad_y)


def _forward() -> Iterator[Spec]:
    for comment, (flag, batch) in BATCHES.items():
        X = gaussian(f"text {comment}", (*batch, 4, 3))
        P = gaussian(f"prompt {comment}", (2, 3))
        yield Spec(comment, (flag,), {"X": X, "P": P}, {})


def _backward() -> Iterator[Spec]:
    for comment, (flag, batch) in BATCHES.items():
        grad_y = integers(f"gradient {comment}", (*batch, 6, 3), 99)
        P = integers(f"prompt {comment}", (2, 3))
        yield Spec(comment, (flag,), {"grad_y": grad_y, "P": P}, {})


def _normal() -> Spec:
    """A batch of five: four roundings for their sum, and one for the output."""
    grad_y = gaussian("prompt normal gradient", (5, 6, 3))
    P = gaussian("prompt normal", (2, 3))
    spec = Spec("normal values", ("Batch", "Normal"), {"grad_y": grad_y, "P": P}, {})
    size = np.abs(grad_y[:, :2].astype(np.float64)).sum(axis=0)
    return replace(spec, roundings={"grad_P": 5}, magnitudes={"grad_P": size})


def _alone(operation: str) -> Spec:
    shapes = {"X": (0, 3), "P": (2, 3)}
    if operation == "prompt_backward":
        shapes = {"grad_y": (2, 3), "P": (2, 3)}
    return whole(operation, "a text without tokens", "NoText", shapes, {})
