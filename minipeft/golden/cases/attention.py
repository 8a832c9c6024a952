"""Cases of attention_forward and attention_backward."""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, sqrt

import numpy as np

from minipeft.golden.cases import File, Named, Spec, any_zero, gaussian, integers
from minipeft.golden.cases.build import given, misfits, refused, whole
from minipeft.golden.tensors import Array
from minipeft.reference import attention
from minipeft.reference.attention import Head

PAPERS = ("https://arxiv.org/abs/1706.03762",)


def files() -> Iterator[File]:
    """Yield the two files of the row."""
    yield File(
        operation="attention_forward",
        header=(
            "y = softmax(Q K^T / sqrt(d)) V; the mask is 1 where a query may look.",
        ),
        source="minipeft.reference.attention.forward",
        papers=PAPERS,
        specs=[
            *_exact(),
            *(_forward(s) for s in _normal()),
            *_blind(),
            *_later("attention_forward"),
        ],
    )
    yield File(
        operation="attention_backward",
        header=("The gradients of Q, K and V for the gradient of y.",),
        source="minipeft.reference.attention.backward",
        papers=PAPERS,
        specs=[
            *(_backward(s) for s in _normal()),
            *(_exact_backward(keys) for keys in (2, 4)),
            *_later("attention_backward"),
        ],
    )


def _exact() -> Iterator[Spec]:
    for keys in (1, 4, 8):
        Q = np.zeros((2, 3), np.float32)
        K, V = (integers(f"equal {n} {keys}", (keys, 3)) for n in "KV")
        inputs = {"Q": Q, "K": K, "V": V}
        yield Spec(f"{keys} keys, equal shares", ("EqualShares",), inputs, {})
    Q, K, V = (gaussian(f"one key {n}", (3, 4)) for n in "QKV")
    mask = np.eye(3, dtype=np.uint8)[[2, 0, 1]]
    inputs = {"Q": Q, "K": K, "V": V, "mask": mask}
    yield Spec("one key for each query", ("OneKey",), inputs, {})


def _normal() -> Iterator[Spec]:
    for comment, flags, batch, sizes, scale, masked in [
        ("no mask", "Basic", (), (3, 5, 4), 1.0, False),
        ("causal, square", "Causal", (), (4, 4, 3), 1.0, True),
        ("causal, three keys before the text", "Causal", (), (3, 6, 2), 1.0, True),
        ("one axis", "Batch", (2,), (3, 4, 2), 1.0, True),
        ("two axes", "Batch", (2, 2), (2, 3, 2), 1.0, False),
        ("logits of hundreds", "LargeLogits", (), (3, 4, 4), 20.0, False),
    ]:
        queries, keys, d = sizes
        shapes = {"Q": (queries, d), "K": (keys, d), "V": (keys, d + 1)}
        inputs = {
            name: gaussian(f"{comment} {name}", (*batch, *shape))
            for name, shape in shapes.items()
        }
        inputs["Q"] = inputs["Q"] * np.float32(scale)
        inputs["K"] = inputs["K"] * np.float32(scale)
        if masked:
            inputs["mask"] = attention.causal(queries, keys).astype(np.uint8)
        yield Spec(comment, tuple(flags.split()), inputs, {})


def _forward(spec: Spec) -> Spec:
    head = double_head(spec.inputs)
    size = attention.weights(head) @ np.abs(head.V)
    return replace(spec, roundings={"y": roundings(head)}, magnitudes={"y": size})


def _backward(spec: Spec) -> Spec:
    head = double_head(spec.inputs)
    shape = attention.forward(head).shape
    grad_y = gaussian(f"{spec.comment} grad_y", shape)
    n = 3 * roundings(head) + sum(shape[-2:]) + 8
    return replace(
        spec,
        inputs={"grad_y": grad_y, **spec.inputs},
        roundings={f"grad_{name}": n for name in "QKV"},
        magnitudes=_gradient_sizes(np.abs(grad_y.astype(np.float64)), head),
    )


def _gradient_sizes(G: Array, head: Head) -> Named:
    """Return bounds of the gradients: the sums of the absolute terms."""
    P, root = attention.weights(head), sqrt(head.Q.shape[-1])
    share = G @ np.abs(head.V).swapaxes(-1, -2)
    S = P * (share + (P * share).sum(axis=-1, keepdims=True)) / root
    return {
        "grad_Q": S @ np.abs(head.K),
        "grad_K": S.swapaxes(-1, -2) @ np.abs(head.Q),
        "grad_V": P.swapaxes(-1, -2) @ G,
    }


def _blind() -> Iterator[Spec]:
    Q, K, V = (gaussian(f"blind {n}", (2, 3)) for n in "QKV")
    mask = np.array([[1, 1], [0, 0]], np.uint8)
    inputs = {"Q": Q, "K": K, "V": V, "mask": mask}
    yield Spec("query 1 sees nothing", ("BlindQuery",), inputs, {}, result="policy")


def _exact_backward(keys: int) -> Spec:
    """Equal shares of a power of two, and heads of width 16: nothing is rounded.

    Half of the scaling may go to the queries and half to the keys: 16^-1/4 is exact.
    """
    comment = f"{keys} keys, equal shares"
    shapes = {"grad_y": (3, 2), "Q": (3, 16), "K": (keys, 16), "V": (keys, 2)}
    spec = whole("attention_backward", comment, "EqualShares", shapes, {})
    return any_zero("attention_backward", given(spec, Q=np.zeros((3, 16), np.float32)))


def _masks() -> Iterator[Spec]:
    inputs = {n: gaussian(f"two masks {n}", (2, 3, 3)) for n in "QKV"}
    mask = np.stack([np.tri(3), np.tri(3)[::-1, ::-1]]).astype(np.uint8)
    yield Spec("one mask for each text", ("Batch",), {**inputs, "mask": mask}, {})


def _later(operation: str) -> Iterator[Spec]:
    exact = operation == "attention_forward"
    yield from (_forward(s) if exact else _backward(s) for s in _masks())
    fine = _fits(operation, (2,))
    mask = np.ones((2, 3, 4), np.uint8)
    mask[1, 2] = 0
    comment = "query 2 of text 1 sees nothing"
    yield refused(given(fine, mask=mask), comment, "BlindQuery Batch")
    if operation == "attention_backward":
        mask = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], np.uint8)
        blind = given(_fits(operation, ()), mask=mask)
        yield refused(blind, "query 1 sees nothing", "BlindQuery")
    plain = given(_fits(operation, ()), mask=np.ones((3, 4), np.uint8))
    # Every library broadcasts a mask of one row or column.
    wrong = misfits(operation, plain, ())
    yield from (s for s in wrong if not s.comment.startswith("mask has one"))
    if exact:
        yield _hidden()
    else:
        yield from (_zero_keys(keys) for keys in (2, 4))


def _hidden() -> Spec:
    """One key for each query, and the hidden ones have far larger logits."""
    comment = "the hidden keys have the largest logits"
    Q = np.array([[256, 0], [0, 256]], np.float32)
    V = integers(comment, (3, 2))
    K = np.array([[-256, 256], [256, -256], [256, 256]], np.float32)
    mask = np.array([[1, 0, 0], [0, 1, 0]], np.uint8)
    inputs = {"Q": Q, "K": K, "V": V, "mask": mask}
    return Spec(comment, ("OneKey", "LargeLogits"), inputs, {})


def _zero_keys(keys: int) -> Spec:
    """As `_exact_backward`, for the gradient of K."""
    shapes = {"grad_y": (3, 2), "Q": (3, 16), "K": (keys, 16), "V": (keys, 2)}
    comment = f"{keys} keys of zeros"
    spec = whole("attention_backward", comment, "EqualShares", shapes, {})
    K = np.zeros((keys, 16), np.float32)
    return any_zero("attention_backward", given(spec, K=K))


def _fits(operation: str, batch: tuple[int, ...]) -> Spec:
    shapes = {"Q": (3, 2), "K": (4, 2), "V": (4, 5)}
    if operation == "attention_backward":
        shapes = {"grad_y": (3, 5), **shapes}
    batched = {name: (*batch, *shape) for name, shape in shapes.items()}
    return whole(operation, f"fits {batch}", "ShapeMismatch", batched, {})


def double_head(inputs: Named) -> Head:
    """Return the head in float64."""
    Q, K, V = (inputs[name].astype(np.float64) for name in "QKV")
    mask = inputs["mask"].astype(bool) if "mask" in inputs else None
    return Head(Q, K, V, mask)


def roundings(head: Head) -> int:
    """Return how many roundings a share, and a sum of shares, is worth.

    exp turns the absolute error of a logit into a relative one: that of a sum of d
    products, times its size, once for the logit and once for the largest.
    """
    d, keys = head.Q.shape[-1], head.K.shape[-2]
    largest = float((np.abs(head.Q) @ np.abs(head.K).swapaxes(-1, -2)).max()) / sqrt(d)
    return ceil(2 * ((d + 3) * 2 * largest + keys + 8)) + 2 * keys
